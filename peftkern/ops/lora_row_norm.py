"""lora_row_norm: what DoRA divides its magnitudes by.

    norm[n] = sqrt(sum_k (W[n, k] + s sum_r B[n, r] A[r, k])^2)

    W weight (N, K)   A lora_A (R, K)   B lora_B (N, R)   s scaling

W is read once, and neither B A nor the sum is ever there as a whole. DoRA takes the norm as a constant, so there is no
gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..bases.base import kind_of
from ..checks import accumulate_dtype, check_adapters, check_number
from ..dispatch.registry import define
from ..problem import Problem, problem_like

# Elements of the scratch that the reference adds W and B A in.
SCRATCH = 1 << 22


class RowNorm(NamedTuple):
    """Arguments of ``lora_row_norm`` -> norm (N,) in fp32, or fp64 for fp64."""

    base: list[Tensor]
    kind: str
    lora_A: Tensor
    lora_B: Tensor
    scaling: float


def _like(c: RowNorm) -> Tensor:
    """Whose dtype the norm follows: a dense weight, else the adapters."""
    if c.kind == "identity":
        raise ValueError("the identity has no weight whose rows have norms")
    return c.base[0] if c.kind == "dense" else c.lora_A


def lora_row_norm_ref(c: RowNorm) -> Tensor:
    """norm (N,); see ``RowNorm``."""
    acc, (N, K) = accumulate_dtype(_like(c).dtype), (c.lora_B.shape[0], c.lora_A.shape[1])
    weight = kind_of(c.kind).dequantise(c.base, c.base[0].dtype if c.kind == "dense" else acc, (N, K))
    A, out = c.lora_A.to(acc), weight.new_empty(N, dtype=acc)
    rows = max(1, SCRATCH // max(K, 1))
    for first in range(0, N, rows):
        part = slice(first, first + rows)
        total = torch.addmm(weight[part].to(acc), c.lora_B[part].to(acc), A, alpha=c.scaling)
        torch.linalg.vector_norm(total, dim=1, out=out[part])
    return out


def _describe(c: RowNorm) -> Problem:
    like, kind = _like(c), kind_of(c.kind)
    known = (None, None) if kind.sized else (c.lora_A.shape[-1], c.lora_B.shape[0])
    N, K = kind.check(c.base, like, *known)
    R = check_adapters(c.lora_A, c.lora_B, like, N, K)
    check_number("scaling", c.scaling)
    return problem_like(like, "lora_row_norm", c.lora_A.dtype, (0, N, K, R), {c.kind: c.kind != "dense"})


def _fake(c: RowNorm) -> Tensor:
    p = _describe(c)
    return c.lora_A.new_empty(p.N, dtype=accumulate_dtype(p.dtype))


define(
    "lora_row_norm",
    RowNorm,
    "Tensor",
    reference=lora_row_norm_ref,
    fake=_fake,
    describe=_describe,
    flops=lambda p, c: 2 * p.N * p.K * p.R,
)

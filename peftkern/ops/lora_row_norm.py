"""lora_row_norm: what DoRA divides its magnitudes by.

    norm[n] = sqrt(sum_k (W[n, k] + s sum_r B[n, r] A[r, k])^2)

    W weight (N, K)   A lora_A (R, K)   B lora_B (N, R)   s scaling

W is read once, and neither B A nor the sum is ever there as a whole. DoRA takes the norm as a constant, so there is no
gradient.
"""

from __future__ import annotations

import torch

from ..dispatch.registry import define
from ..problem import Problem
from .checks import accumulate_dtype, check_number, check_tensor
from .lora_linear import _adapter_dtypes, _check_adapters, _problem

# Elements of the scratch that the reference adds W and B A in.
_SCRATCH = 1 << 22


def lora_row_norm_ref(weight, lora_A, lora_B, scaling):
    """norm (N,) in fp32, or fp64 for fp64."""
    acc = accumulate_dtype(weight.dtype)
    N, K = weight.shape
    A, out = lora_A.to(acc), weight.new_empty(N, dtype=acc)
    rows = max(1, _SCRATCH // max(K, 1))
    for first in range(0, N, rows):
        part = slice(first, first + rows)
        total = torch.addmm(weight[part].to(acc), lora_B[part].to(acc), A, alpha=scaling)
        torch.linalg.vector_norm(total, dim=1, out=out[part])
    return out


def _describe(weight, lora_A, lora_B, scaling) -> Problem:
    check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K)")
    N, K = weight.shape
    _, R = _check_adapters(lora_A, lora_B, _adapter_dtypes(weight.dtype), weight.device, N, K)
    check_number("scaling", scaling)
    return _problem("lora_row_norm", weight, lora_A, 0, N, K, R)


def _fake(weight, lora_A, lora_B, scaling):
    _describe(weight, lora_A, lora_B, scaling)
    return weight.new_empty(weight.shape[0], dtype=accumulate_dtype(weight.dtype))


define(
    "lora_row_norm",
    "(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor",
    reference=lora_row_norm_ref,
    fake=_fake,
    describe=_describe,
    flops=lambda p, *args: 2 * p.N * p.K * p.R,
)

"""block_rotate: blocks of columns times a small square matrix each, what OFT and BOFT do to a layer's input.

    y[m, at(g b + j)]  = sum_i x[m, at(g b + i)] R[g, i, j]           block_rotate
    dR[g, i, j]        = sum_m x[m, at(g b + i)] dy[m, at(g b + j)]   block_rotate_bwd

x (M, K)   R (G, b, b), a matrix for each of the G = K / b blocks, or (1, b, b) for all of them   at: ``index`` (K), a
permutation of the columns, or none. Columns are gathered and scattered by the same permutation, so the gradient of x is
``block_rotate_fwd`` of dy with R transposed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import accumulate_dtype, check_fits, check_rows, check_tensor
from ..dispatch.registry import Size, define
from ..problem import Problem, problem_like

# Elements of the scratch of the reference, in the dtype of sums.
SCRATCH = 1 << 22


class Rotation(NamedTuple):
    """Arguments of ``block_rotate_fwd`` -> y (M, K) in x's dtype; R in x's dtype or fp32."""

    x: Tensor
    R: Tensor
    index: Tensor | None = None


class RotationGrad(NamedTuple):
    """Arguments of ``block_rotate_bwd`` -> dR (K / b, b, b) in fp32, or fp64 for fp64; ``size``: b."""

    x: Tensor
    dy: Tensor
    size: Size
    index: Tensor | None = None


def _blocks(t: Tensor, size: int, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(G, M, b)."""
    t = t if index is None else t[:, index]
    return t.to(dtype).unflatten(1, (-1, size)).transpose(0, 1)


def _parts(M: int, K: int) -> list[slice]:
    rows = max(1, SCRATCH // max(K, 1))
    return [slice(first, first + rows) for first in range(0, M, rows)]


def block_rotate_fwd_ref(c: Rotation) -> Tensor:
    """y; see ``Rotation``."""
    x, R, index = c
    (M, K), b, acc = x.shape, R.shape[1], accumulate_dtype(x.dtype)
    y = torch.empty((M, K), dtype=x.dtype, device=x.device)
    if K == 0:
        return y
    R = R.to(acc).expand(K // b, b, b)
    for part in _parts(M, K):
        rotated = torch.bmm(_blocks(x[part], b, index, acc), R).transpose(0, 1).flatten(1).to(x.dtype)
        if index is None:
            y[part] = rotated
        else:
            y[part, index] = rotated
    return y


def block_rotate_bwd_ref(c: RotationGrad) -> Tensor:
    """dR; see ``RotationGrad``."""
    (M, K), b, acc = c.x.shape, c.size, accumulate_dtype(c.x.dtype)
    dR = torch.zeros((K // b, b, b), dtype=acc, device=c.x.device)
    for part in _parts(M, K) if K else ():
        x, dy = (_blocks(t[part], b, c.index, acc) for t in (c.x, c.dy))
        dR.baddbmm_(x.transpose(1, 2), dy)
    return dR


def _check_index(index: Tensor | None, K: int, device: torch.device) -> None:
    if index is not None:
        check_fits("index", index, (K,), "(K,)", device, (torch.int64,))


def _describe(c: Rotation) -> Problem:
    M, K = check_rows("x", c.x, letter="K")
    check_tensor("R", c.R)
    G, b = (c.R.shape[0], c.R.shape[-1]) if c.R.dim() == 3 else (0, 0)
    if c.R.dim() != 3 or c.R.shape[1] != b or b < 1 or G * b not in (K, b) or K % b:
        raise ValueError(f"R has shape {tuple(c.R.shape)}, expected (G, b, b) or (1, b, b) with G b = K = {K}")
    check_fits("R", c.R, (G, b, b), "(G, b, b)", c.x.device, (c.x.dtype, torch.float32))
    _check_index(c.index, K, c.x.device)
    flags = {"index": c.index, "shared": G * b != K}
    return problem_like(c.x, "block_rotate_fwd", c.R.dtype, (M, K, K, b), flags)


def _describe_grad(c: RotationGrad) -> Problem:
    M, K = check_rows("x", c.x, letter="K")
    check_fits("dy", c.dy, (M, K), "(M, K)", c.x.device, (c.x.dtype,))
    if isinstance(c.size, bool) or c.size < 1 or K % c.size:
        raise ValueError(f"size is {c.size}, expected a divisor of K = {K}")
    _check_index(c.index, K, c.x.device)
    return problem_like(c.x, "block_rotate_bwd", None, (M, K, K, c.size), {"index": c.index})


def _fake(c: Rotation) -> Tensor:
    _describe(c)
    return c.x.new_empty(c.x.shape)


def _fake_grad(c: RotationGrad) -> Tensor:
    p = _describe_grad(c)
    return c.x.new_empty((p.K // p.R, p.R, p.R), dtype=accumulate_dtype(p.dtype))


def _flops(p: Problem, c) -> int:
    return 2 * p.M * p.K * p.R


define(
    "block_rotate_fwd", Rotation, "Tensor", reference=block_rotate_fwd_ref, fake=_fake, describe=_describe, flops=_flops
)  # fmt: skip
define(
    "block_rotate_bwd", RotationGrad, "Tensor", reference=block_rotate_bwd_ref, fake=_fake_grad,
    describe=_describe_grad, flops=_flops,
)  # fmt: skip

"""Blocks of columns of an activation, each times a matrix of its own. Saved for backward: x if R trains."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_tensor
from ..dispatch.registry import caller
from ..dispatch.watch import nobody_watches
from .saved import first_only, kept_input, read_saved
from .shapes import autocast_dtype, cast, no_transforms, rows_of

_fwd = caller("block_rotate_fwd")
_bwd = caller("block_rotate_bwd")


class BlockRotateFunction(torch.autograd.Function):
    """The op with its gradients. ``dtype``: what x is cast to."""

    @staticmethod
    def forward(ctx, x, R, index, dtype):
        given = cast(x, dtype)
        need_x, need_R = ctx.needs_input_grad[:2]
        kept = None
        if need_R:
            kept = x if torch.compiler.is_compiling() else kept_input(x, given, None)
        ctx.save_for_backward(kept, R if need_x else None, index)
        ctx.x = x.dtype, dtype
        ctx.R = R.shape, R.dtype
        return _fwd(rows_of(given, dtype), R, index).view(x.shape)

    @staticmethod
    @first_only("block_rotate")
    def backward(ctx, dy):
        (x, R, index), needs = read_saved(
            ctx, "block_rotate", lambda: ("x", "R", "index"), lambda n: (n[1], n[0], True)
        )
        (x_dtype, dtype), (shape, R_dtype) = ctx.x, ctx.R
        rows, dx, dR = rows_of(dy, dtype), None, None
        if needs[0]:
            dx = cast(_fwd(rows, R.transpose(1, 2), index), x_dtype).view(dy.shape)
        if needs[1]:
            dR = _bwd(rows_of(x, dtype), rows, shape[1], index)
            dR = cast(dR if len(dR) == shape[0] else dR.sum(0, keepdim=True), R_dtype)
        return dx, dR, None, None


def block_rotate(x: Tensor, R: Tensor, index: Tensor | None = None) -> Tensor:
    """Blocks of columns of x, each times its matrix.

        y[..., index[g b + j]] = sum_i x[..., index[g b + i]] R[g, i, j]

    Args:
        x: (..., K) in fp32, bf16 or fp16 (fp64 through the reference).
        R: (K / b, b, b), or (1, b, b) of all blocks, in fp32 or x's dtype.
        index: int64 (K), a permutation of the columns; None: as they are.

    Returns (..., K) in x's dtype, or in autocast's dtype under autocast. Gradients have their inputs' dtypes.

    Raises ValueError and TypeError, naming the argument that does not fit; RuntimeError for a second derivative and under a
    torch.func transform, NotImplementedError for a tangent of forward-mode AD.
    """
    if not nobody_watches():
        no_transforms("block_rotate")
    check_tensor("x", x)
    check_tensor("R", R)
    dtype = autocast_dtype(x) or x.dtype
    if R.dtype not in (dtype, torch.float32) and dtype != x.dtype:
        R = R.to(dtype)
    if torch.is_grad_enabled() and (x.requires_grad or R.requires_grad):
        return BlockRotateFunction.apply(x, R, index, dtype)
    return _fwd(rows_of(x, dtype), R, index).view(x.shape)

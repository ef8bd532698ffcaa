"""A frozen convolution with a low-rank branch as a differentiable function: y = conv(x, W) + bias + conv_1x1(conv(x, A), B).

Where the outputs outnumber the rows of W, which is what most convolutions are like, both products are one: a convolution with
W + BA, made anew for every pass, which costs less than a branch over all of the outputs. Elsewhere the branch is added in
place. No gradient is as large as a weight: dA and dB come from conv(x, A), which is computed in backward where the forward
pass does without it. Saved: x if A needs a gradient, conv(x, A) where it was made, parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .shapes import autocast_dtype, cast

_ROWS = 2  # outputs for each row of W, from which on one convolution is faster


class Geometry(NamedTuple):
    """How a kernel goes over its input, a number for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, of: Geometry) -> Tensor:
    """A convolution without groups of x (batch, C, ...)."""
    return torch.convolution(x, weight, bias, *of, False, (0,) * len(of.stride), 1)


def _back(dy: Tensor, x: Tensor, weight: Tensor, of: Geometry, needs: tuple[bool, bool]):
    # (dx, dweight) of conv.
    none = (0,) * len(of.stride)
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *of, False, none, 1, [*needs, False])[:2]


def _columns(t: Tensor) -> Tensor:
    # (batch, C, spatial): a view of a tensor whose spatial dimensions lie in order.
    return t.view(t.shape[0], t.shape[1], t.shape[2:].numel())


def _of_each(lora_B: Tensor, u: Tensor) -> Tensor:
    # (batch, N, R): B for each sample of u.
    return lora_B.flatten(1).expand(u.shape[0], -1, -1)


def _adapted(weight: Tensor, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    # W + BA.
    return cast(torch.addmm(weight.flatten(1), lora_B.flatten(1), lora_A.flatten(1)).view(weight.shape), dtype)


def _with_branch(y: Tensor, u: Tensor, lora_B: Tensor) -> Tensor:
    # y + Bu, in place, in u's dtype.
    y = cast(y, u.dtype)
    _columns(y).baddbmm_(_of_each(lora_B, u), u.flatten(2))
    return y


class LoRAConvFunction(torch.autograd.Function):
    """The equation at the top. ``dropped``: the branch's input, None for x itself; B is scaled already. ``wide``: y is not
    rounded to x's dtype where the branch is in a wider one."""

    @staticmethod
    def forward(ctx, x, dropped, weight, lora_A, lora_B, bias, of, wide):
        own, need_A, need_B = dropped is None, ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        # A weight in a dtype of its own is autocast's affair.
        inner = lora_A.dtype if weight.dtype == x.dtype else x.dtype
        outputs = x.shape[0] * x.shape[2:].numel() // torch.Size(of.stride).numel()
        folds = own and weight.dtype == lora_A.dtype and outputs >= _ROWS * weight.shape[0]
        branch, u = x if own else dropped, None
        if not folds or (need_B and not need_A):
            u = conv(cast(branch, inner), cast(lora_A, inner), None, of)
        kernel = _adapted(weight, lora_A, lora_B, x.dtype) if folds else cast(weight, x.dtype)
        y = conv(x, kernel, None if bias is None else cast(bias, x.dtype), of)
        if not folds:
            y = _with_branch(y, u, cast(lora_B, inner))
        ctx.save_for_backward(branch if need_A else None, weight, lora_A, lora_B, u if need_B else None)
        ctx.of, ctx.folds, ctx.inner, ctx.own, ctx.x = of, folds, inner, own, (x.shape, x.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y if wide else cast(y, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        need_x, need_dropped, _, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        branch, weight, lora_A, lora_B, u = ctx.saved_tensors
        (shape, dtype), inner, of = ctx.x, ctx.inner, ctx.of
        A, B, d = cast(lora_A, inner), cast(lora_B, inner), cast(dy, inner).flatten(2)
        own, folds = ctx.own, ctx.folds
        # Only the shape of an input counts for its own gradient.
        like = dy.new_empty(1).expand(shape) if branch is None else branch
        dx = ddropped = dA = dB = None
        if need_B:
            u = conv(cast(branch, inner), A, None, of) if u is None else u
            dB = cast(torch.bmm(d, u.flatten(2).mT).sum(0).view(lora_B.shape), lora_B.dtype)
        through = need_x if own and not folds else need_dropped
        if need_A or through:
            du = torch.bmm(_of_each(B, dy).mT, d).view(dy.shape[0], A.shape[0], *dy.shape[2:])
            through, dA = _back(du, cast(like, inner), A, of, (through, need_A))
            dA = None if dA is None else cast(dA, lora_A.dtype)
        if need_x:
            kernel = _adapted(weight, lora_A, lora_B, dtype) if folds else cast(weight, dtype)
            dx, _ = _back(cast(dy, dtype), cast(like, dtype), kernel, of, (True, False))
            if own and not folds:
                dx.add_(through)
        if need_dropped:
            ddropped = cast(through, dtype)
        dbias = dy.sum((0, *range(2, dy.dim())), dtype=ctx.bias_dtype) if need_bias else None
        return dx, ddropped, None, dA, dB, dbias, None, None


def lora_conv(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, of: Geometry, *,
    dropped: Tensor | None = None, wide: bool = False,
) -> Tensor:  # fmt: skip
    """y (batch, N, ...) of a frozen convolution and a branch.

    Args:
        x: (batch, C, ...). weight: (N, C, kernel) in x's dtype, which gets no gradient. bias: (N) in any dtype, or None.
        lora_A: (R, C, kernel). lora_B: (N, R, 1, ...), with the branch's scaling in it. Both in fp32 or x's dtype.
        of: of both convolutions over x. dropped: the branch's input, None for x itself. wide: y in the dtype of the
            adapters where that is wider.

    Under autocast the convolutions are in autocast's dtype, and W + BA is made before it is rounded.
    """
    dtype = autocast_dtype(x)
    if dtype is None:
        return LoRAConvFunction.apply(x, dropped, weight, lora_A, lora_B, bias, of, wide)
    x, dropped = (None if t is None else cast(t, dtype) for t in (x, dropped))
    with torch.autocast(x.device.type, enabled=False):
        return LoRAConvFunction.apply(x, dropped, weight, lora_A, lora_B, bias, of, False)

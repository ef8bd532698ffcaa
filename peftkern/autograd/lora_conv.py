"""A frozen convolution with a low-rank branch as a differentiable function: y = conv(x, W) + bias + s conv_1x1(conv(x, A), B).

Where the outputs outnumber the rows of W, which is what most convolutions are like, both products are one: a convolution with
W + s BA, made anew for every pass, which costs less than a branch over all of the outputs. No gradient is as large as a weight:
dA and dB come from conv(x, A), which is computed in backward. Saved: parameters, and x if A needs a gradient, conv(x, A) if B
alone does. Elsewhere torch's own convolutions are composed, the scaling in B and the branch added in place.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .saved import first_only
from .shapes import autocast_dtype, cast

ROWS = 1, 8  # outputs for each row of W from which on one convolution is faster: without gradients, and with


class Geometry(NamedTuple):
    """How a kernel goes over its input, a number for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


class Call(NamedTuple):
    """What a layer takes besides tensors. ``wide``: y is not rounded to x's dtype where the branch is in a wider one."""

    of: Geometry
    scaling: float = 1.0
    wide: bool = False


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, of: Geometry) -> Tensor:
    """A convolution without groups of x (batch, C, ...)."""
    return torch.convolution(x, weight, bias, *of, False, (0,) * len(of.stride), 1)


def _back(dy: Tensor, x: Tensor, weight: Tensor, of: Geometry, needs: tuple[bool, bool]):
    # (dx, dweight) of conv.
    none = (0,) * len(of.stride)
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *of, False, none, 1, [*needs, False])[:2]


def _point(of: Geometry) -> Geometry:
    # Of a 1x1 convolution.
    n = len(of.stride)
    return Geometry((1,) * n, (0,) * n, (1,) * n)


def _adapted(weight: Tensor, lora_A: Tensor, lora_B: Tensor, s: float, dtype: torch.dtype) -> Tensor:
    # W + s BA.
    return cast(torch.addmm(weight.flatten(1), lora_B.flatten(1), lora_A.flatten(1), alpha=s).view(weight.shape), dtype)


class LoRAConvFunction(torch.autograd.Function):
    """The equation at the top as one convolution, in x's dtype."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, call):
        of, s, _ = call
        need_A, need_B = ctx.needs_input_grad[2:4]
        u = conv(x, cast(lora_A, x.dtype), None, of) if need_B and not need_A else None
        ctx.save_for_backward(x if need_A else None, weight, lora_A, lora_B, u)
        ctx.call, ctx.x = call, (x.shape, x.dtype)
        return conv(x, _adapted(weight, lora_A, lora_B, s, x.dtype), bias, of)

    @staticmethod
    @first_only("lora_conv")
    def backward(ctx, dy):
        need_x, _, need_A, need_B, need_bias, _ = ctx.needs_input_grad
        x, weight, lora_A, lora_B, u = ctx.saved_tensors
        (of, s, _), (shape, dtype) = ctx.call, ctx.x
        dx = dA = dB = None
        if need_A or need_B:
            A, B = cast(lora_A, dtype), cast(lora_B * s, dtype)
            if u is None:  # what du needs of it is its shape
                u = conv(x, A, None, of) if need_B else dy.new_empty(1).expand(dy.shape[0], A.shape[0], *dy.shape[2:])
            du, dB = _back(dy, u, B, _point(of), (need_A, need_B))
            dB = cast(dB, lora_B.dtype) * s if need_B else None
            dA = cast(_back(du, x, A, of, (False, True))[1], lora_A.dtype) if need_A else None
        if need_x:
            like = dy.new_empty(1).expand(shape) if x is None else x
            dx, _ = _back(dy, like, _adapted(weight, lora_A, lora_B, s, dtype), of, (True, False))
        dbias = dy.sum((0, *range(2, dy.dim()))) if need_bias else None
        return dx, None, dA, dB, dbias, None


def _beside(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, call: Call, branch: Tensor
) -> Tensor:
    of, s, wide = call
    # A weight in a dtype of its own is autocast's affair.
    inner = lora_A.dtype if weight.dtype == x.dtype else x.dtype
    apart = bias is not None and bias.dtype == inner != x.dtype  # its gradient is not rounded
    y = conv(x, cast(weight, x.dtype), None if bias is None or apart else cast(bias, x.dtype), of)
    u = conv(cast(branch, inner), cast(lora_A, inner), None, of)
    y = cast(y, inner).add_(conv(u, cast(lora_B * s, inner), bias if apart else None, _point(of)))
    return y if wide else cast(y, x.dtype)


def lora_conv(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, call: Call,
    dropped: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y (batch, N, ...) of a frozen convolution and a branch.

    Args:
        x: (batch, C, ...). weight: (N, C, kernel) in x's dtype, which gets no gradient. bias: (N) in any dtype, or None.
        lora_A: (R, C, kernel). lora_B: (N, R, 1, ...). Both in fp32 or x's dtype.
        call: the geometry of both convolutions over x, s. dropped: the branch's input, None for x itself.

    Under autocast the convolutions are in autocast's dtype, and W + s BA is made before it is rounded.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, dropped = cast(x, dtype), None if dropped is None else cast(dropped, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return lora_conv(x, weight, lora_A, lora_B, bias, call._replace(wide=False), dropped)
    trains = torch.is_grad_enabled() and (x.requires_grad or lora_A.requires_grad or lora_B.requires_grad)
    outputs = x.shape[0] * x.shape[2:].numel() // math.prod(call.of.stride)
    if dropped is not None or weight.dtype != lora_A.dtype or outputs < ROWS[trains] * weight.shape[0]:
        return _beside(x, weight, lora_A, lora_B, bias, call, x if dropped is None else dropped)
    bias = None if bias is None else cast(bias, x.dtype)
    if trains:
        return LoRAConvFunction.apply(x, weight, lora_A, lora_B, bias, call)
    return conv(x, _adapted(weight, lora_A, lora_B, call.scaling, x.dtype), bias, call.of)

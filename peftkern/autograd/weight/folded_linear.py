"""A linear layer whose weight is made anew at every step, and gets a gradient.

    y = x W^T + bias        dx = dy W        dW = dy^T x        dbias = sum_t dy

Three products, each by whoever is fastest. W may be in fp32 where x is in half precision, since a small change of a weight
would not survive its rounding, or the other way round. All is then computed in fp32.
Saved for backward: W if x needs a gradient; x, as ``lora_linear`` keeps it, if W does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..saved import first_only, kept_input, read_saved
from ..shapes import autocast_dtype, cast, rows_of
from .base_product import base_product

_NAMES = "x", "weight"
# Up to so many products of numbers torch's own layer is left to itself: a node in Python costs more than its product does.
SMALL = 1 << 20


class FoldedLinearFunction(torch.autograd.Function):
    """``folded_linear`` with its gradients. ``dtype``: of the products."""

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        need_x, need_weight, *_ = ctx.needs_input_grad
        given, W = cast(x, dtype), cast(weight, dtype)
        kept = x if need_weight else None
        if kept is not None and not torch.compiler.is_compiling():
            kept = kept_input(x, given, None)
        narrow = W if W.dtype.itemsize < weight.dtype.itemsize else weight
        ctx.save_for_backward(kept, narrow if need_x else None)
        ctx.dtype, ctx.dtypes = dtype, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return base_product(given, W, None if bias is None else cast(bias, torch.promote_types(dtype, torch.float32)))

    @staticmethod
    @first_only("folded_linear")
    def backward(ctx, dy):
        (x, W), needs = read_saved(ctx, "folded_linear", lambda: _NAMES, lambda needs: (needs[1], needs[0]))
        dtype, (x_dtype, weight_dtype, bias_dtype) = ctx.dtype, ctx.dtypes
        dx = dW = dbias = None
        dy = cast(dy, dtype)
        if needs[0]:
            dx = cast(base_product(dy, cast(W, dtype).t()), x_dtype)
        rows = rows_of(dy, dtype)
        if needs[1]:
            dW = cast(base_product(rows.t().contiguous(), rows_of(x, dtype).t()), weight_dtype)
        if needs[2]:
            dbias = cast(rows.sum(0, dtype=torch.promote_types(dtype, torch.float32)), bias_dtype)
        return dx, dW, dbias, None


def folded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (..., N) of x (..., K), in the products' dtype: the wider one of x's and the weight's, or under autocast autocast's.

    x: as in ``lora_linear``. weight: (N, K). bias: (N), added before y is rounded. ``torch.jit.trace`` records torch's own ops.
    """
    autocast = autocast_dtype(x)
    dtype = autocast or torch.promote_types(x.dtype, weight.dtype)
    small = autocast is None and dtype is weight.dtype is torch.float32 and x.numel() * weight.shape[0] <= SMALL
    if small or torch._C._get_tracing_state() is not None:
        return F.linear(cast(x, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype))
    return FoldedLinearFunction.apply(x, weight, bias, dtype)

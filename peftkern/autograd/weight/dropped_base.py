"""The base product of a dropped input, scaled: what DoRA adds in training with dropout.

    y = g * (drop(x) W^T)

It is one term of a sum that is rounded once, so half precision is multiplied in fp32, with panels of W, and y comes in fp32.
Saved for backward: drop(x) W^T (M, N) if g needs a gradient, and a seed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...checks import accumulate_dtype
from ..dropout_mask import zeroed
from ..saved import first_only
from ..shapes import autocast_dtype, cast
from .base_product import base_product

PANEL = 2**22  # elements of W in another dtype than its own


def panels(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of W in this dtype, all of them at once where it is W's own."""
    N, K = weight.shape
    rows = max(N if weight.dtype == dtype else PANEL // max(K, 1), 1)
    for first in range(0, N, rows):
        part = slice(first, min(first + rows, N))
        yield part, cast(weight[part], dtype)


class DroppedBaseFunction(torch.autograd.Function):
    """``dropped_base`` with its gradients."""

    @staticmethod
    def forward(ctx, x, weight, g, p, seed):
        dtype = autocast_dtype(x) or accumulate_dtype(x.dtype)
        left = cast(zeroed(x, p, seed), dtype)
        products = [base_product(left, panel) for _, panel in panels(weight, dtype)]
        h = torch.cat(products, -1) if len(products) != 1 else products[0]
        ctx.save_for_backward(weight, g, seed, h if ctx.needs_input_grad[2] else None)
        ctx.p, ctx.dtypes = p, (x.dtype, dtype)
        return h * (g / (1.0 - p))

    @staticmethod
    @first_only("dropped_base")
    def backward(ctx, dy):
        weight, g, seed, h = ctx.saved_tensors
        p, (given, dtype) = ctx.p, ctx.dtypes
        dx = dg = None
        if ctx.needs_input_grad[0]:
            dh = cast(dy * (g / (1.0 - p)), dtype)
            parts = (base_product(dh[..., part], panel.t()) for part, panel in panels(weight, dtype))
            dx = zeroed(cast(sum(parts), given), p, seed)
        if h is not None:
            dg = (dy * h).flatten(0, -2).sum(0) / (1.0 - p)
        return dx, None, dg, None, None


def dropped_base(x: Tensor, weight: Tensor, g: Tensor, p: float, seed: Tensor) -> Tensor:
    """y (..., N) of x (..., K), in fp32 (fp64 for fp64).

    Args:
        x, weight (N, K): as in ``lora_linear``; the weight gets no gradient. g: (N) in fp32 (fp64).
        p, seed: of ``zeroed``; what is left of x is divided by 1 - p. Under autocast the product is in autocast's dtype.
    """
    return DroppedBaseFunction.apply(x, weight, g, p, seed)

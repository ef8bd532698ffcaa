"""The product of a frozen weight and a thin matrix: what factors made of W need.

    y = W t,    dt = W^T dy

Half precision is multiplied in the thin matrix's dtype, with panels of W, so no copy of W is ever there as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropped_base import panels


class FrozenProductFunction(torch.autograd.Function):
    """``frozen_product`` with the gradient of t."""

    @staticmethod
    def forward(ctx, weight, t):
        ctx.save_for_backward(weight)
        # In place: what autocast does not cast.
        y = t.new_zeros((weight.shape[0], t.shape[1]))
        for part, panel in panels(weight, t.dtype):
            y[part].addmm_(panel, t)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        dt = dy.new_zeros((weight.shape[1], dy.shape[1]))
        for part, panel in panels(weight, dy.dtype):
            dt.addmm_(panel.t(), dy[part])
        return None, dt


def frozen_product(weight: Tensor, t: Tensor) -> Tensor:
    """y (N, R) of weight (N, K) in any dtype and strides, which gets no gradient, and t (K, R), in t's dtype."""
    return FrozenProductFunction.apply(weight, t)

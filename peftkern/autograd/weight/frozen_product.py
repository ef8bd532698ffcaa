"""The product of a few rows and a frozen weight: what factors made of W need.

    y = x W^T,    dx = dy W

As wide as the rows are: half precision is multiplied by panels of W, so no copy of W is ever there as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..saved import first_only
from .dropped_base import panels


class FrozenProductFunction(torch.autograd.Function):
    """``frozen_product`` with the gradient of x. Products in place, which autocast leaves as they are."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        y = x.new_zeros((x.shape[0], weight.shape[0]))
        for part, panel in panels(weight, x.dtype):
            y[:, part].addmm_(x, panel.t())
        return y

    @staticmethod
    @first_only("frozen_product")
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        dy = dy.contiguous()  # few rows of many columns: a product of columns takes several times as long
        dx = dy.new_zeros((dy.shape[0], weight.shape[1]))
        for part, panel in panels(weight, dy.dtype):
            dx.addmm_(dy[:, part], panel)
        return dx, None


def frozen_product(x: Tensor, weight: Tensor) -> Tensor:
    """y (R, N) of x (R, K) and weight (N, K) of any dtype and strides, which gets no gradient, in x's dtype,
    under autocast too."""
    return FrozenProductFunction.apply(x, weight)

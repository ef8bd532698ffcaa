"""Dropout that keeps its seed for backward, and neither a mask nor its input."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch.registry import caller

_mask = caller("dropout_mask")


class ZeroedFunction(torch.autograd.Function):
    """x with what the seed drops set to 0. The gradient is the same function of dy, so it has derivatives of any order."""

    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.save_for_backward(seed)
        ctx.p = p
        keep = _mask(seed, x.shape[:-1].numel(), x.shape[-1], p).view(x.shape)
        # where, not a product: a dropped NaN contributes exactly 0.
        return torch.where(keep, x, 0.0)

    @staticmethod
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        return ZeroedFunction.apply(dy, ctx.p, seed), None, None


def zeroed(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x (..., K) with elements set to 0, the others as they are, not divided by 1 - p.

    Args:
        x: of any dtype. p: the probability of a 0, 0 <= p < 1. seed: as ``seed_tensor`` makes it; the bits are those of
            ``dropout_mask``, drawn again in backward.
    """
    return ZeroedFunction.apply(x, p, seed)

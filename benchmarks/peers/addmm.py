"""The strongest plain PyTorch statement of a LoRA linear layer: the vendor's product plus in-place ``addmm_``.

    forward   y = x W^T;  u = drop(x) A^T;  y += s u B^T
    backward  dS = s dy B;  dB = s dy^T u;  dA = dS^T drop(x);  dx = dy W;  dx += drop'(dS A)

The idea (accumulate the branch into the base's result so that neither the scaled delta nor the sum is materialised)
is published and in wide use; this is an own statement of it, the bar that a kernel has to pass. Adapters in fp32 are
cast to the activation's dtype, so its results are less exact than those of an op that keeps them in fp32. With
dropout it keeps drop(x) and the mask, the latter in the activation's dtype, because torch multiplies that several
times faster than a bool mask on CPU: this comparator is built for speed, not for memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


class AddmmLoRA(torch.autograd.Function):
    """x (M, K), weight (N, K) frozen, lora_A (R, K), lora_B (N, R): y (M, N) in x.dtype."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, dropout_p):
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        mask, dropped = None, x
        if dropout_p:
            mask = torch.empty_like(x).bernoulli_(1 - dropout_p).div_(1 - dropout_p)
            dropped = x * mask
        u = dropped @ A.t()
        y = x @ weight.t()
        y.addmm_(u, B.t(), alpha=scaling)
        ctx.save_for_backward(dropped, weight, lora_A, lora_B, u, mask)
        ctx.scaling = scaling
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        dropped, weight, lora_A, lora_B, u, mask = ctx.saved_tensors
        A, B = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
        dS = (dy @ B).mul_(ctx.scaling)
        dB = (dy.t() @ u).mul_(ctx.scaling).to(lora_B.dtype)
        dA = (dS.t() @ dropped).to(lora_A.dtype)
        dx = dy @ weight
        if mask is None:
            dx.addmm_(dS, A)
        else:
            dx.addcmul_(dS @ A, mask)
        return dx, None, dA, dB, None, None


def addmm_lora(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float) -> Tensor:
    """The function form of AddmmLoRA, in training mode."""
    return AddmmLoRA.apply(x, weight, lora_A, lora_B, scaling, dropout_p)

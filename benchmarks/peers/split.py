"""The published split of a LoRA layer's graph at its rank-sized products: a peer, stated anew from its description.

LoRAFusion (EuroSys'26) cuts the graph at S and dS, which are M x R and cost nothing to store, and fuses what lies between
the cuts, so that each M x K and M x N tensor is passed over as few times as that allows:

    forward   x' = drop(x) and S = x' A^T in one pass over x, which stores x' and a byte mask;  y = x W^T (vendor);
              y += s S B^T in one pass over y
    backward  dB = s dy^T S and dS = s dy B in one pass over dy;  dA = dS^T x' (vendor);  dx = dy W (vendor);
              dx += mask * (dS A) / (1 - p) in one pass over dx

The original adds the branch inside a Triton product of its own; here the product is the vendor's, in both directions, and
the branch a pass over its result. The passes are Triton kernels on a GPU (split_kernels.py), and torch's operations,
with the same tensors in the same order, on a CPU. As in the original, adapters are used in the activation's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def passes_for(x: Tensor):
    """The passes for tensors like x: the Triton module, or this one."""
    if x.is_cuda or interpreted():
        from . import split_kernels

        return split_kernels
    return TorchPasses


def interpreted() -> bool:
    """Whether Triton runs on CPU tensors in this process."""
    from peftkern import settings

    return settings.current().triton_interpret


class TorchPasses:
    """The four passes in torch's operations."""

    @staticmethod
    def drop_shrink(x: Tensor, A: Tensor, p: float) -> tuple[Tensor, Tensor | None, Tensor]:
        """(x', mask, S): x' is x itself and the mask None without dropout."""
        if not p:
            return x, None, x @ A.t()
        mask = torch.rand(x.shape, device=x.device) >= p
        dropped = (x * mask).mul_(1 / (1 - p))
        return dropped, mask.to(torch.uint8), dropped @ A.t()

    @staticmethod
    def add_product(y: Tensor, v: Tensor, b: Tensor, scaling: float, mask: Tensor | None) -> None:
        """y += scaling * mask * (v b^T), b (columns, R)."""
        if mask is None:
            y.addmm_(v, b.t(), alpha=scaling)
        else:
            y.addcmul_(v @ b.t(), mask.to(y.dtype), value=scaling)

    @staticmethod
    def adapter_grad(dy: Tensor, S: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """(dB in fp32, dS)."""
        return (dy.t() @ S).float().mul_(scaling), (dy @ B).mul_(scaling)


class SplitLoRA(torch.autograd.Function):
    """x (M, K), weight (N, K) frozen, lora_A (R, K), lora_B (N, R): y (M, N) in x.dtype."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, dropout_p):
        passes = passes_for(x)
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        dropped, mask, S = passes.drop_shrink(x, A, dropout_p)
        y = x @ weight.t()
        passes.add_product(y, S, B, scaling, None)
        ctx.save_for_backward(dropped, weight, lora_A, lora_B, S, mask)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        dropped, weight, lora_A, lora_B, S, mask = ctx.saved_tensors
        passes = passes_for(dy)
        A, B = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
        dB, dS = passes.adapter_grad(dy, S, B, ctx.scaling)
        dA = dS.t() @ dropped
        dx = dy @ weight
        passes.add_product(dx, dS, A.t(), 1 / (1 - ctx.dropout_p), mask)
        return dx, None, dA.to(lora_A.dtype), dB.to(lora_B.dtype), None, None


def split_lora(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float) -> Tensor:
    """The function form of SplitLoRA, in training mode."""
    return SplitLoRA.apply(x, weight, lora_A, lora_B, scaling, dropout_p)

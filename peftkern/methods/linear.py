"""Family L: a linear layer with one linear branch, whose coefficients are the method's."""

from __future__ import annotations

from torch import Tensor, nn

from ..autograd.lora_linear import lora_linear
from .registry import Plan


def run(layer: nn.Module, plan: Plan, x: Tensor) -> Tensor:
    """y of a layer with one adapter, its scale vectors included: one fused call."""
    weight, bias, (b,) = plan
    p = b.dropout_p
    return lora_linear(
        x, weight, b.lora_A, b.lora_B, bias=bias, scaling=b.scaling, dropout_p=p, training=p > 0.0, **b.scales
    )

"""Modules: thin holders of parameters around the differentiable functions."""

from .bottleneck import BottleneckAdapter
from .lora import LoRALinear
from .reft import ReFT, reft_positions

__all__ = ["BottleneckAdapter", "LoRALinear", "ReFT", "reft_positions"]

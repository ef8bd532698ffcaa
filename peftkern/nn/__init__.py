"""Modules: thin holders of parameters around the differentiable functions."""

from .lora import LoRALinear

__all__ = ["LoRALinear"]

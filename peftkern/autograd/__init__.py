"""One autograd Function per op, and the public differentiable function above it."""

from .lora_linear import lora_linear

__all__ = ["lora_linear"]

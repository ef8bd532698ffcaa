"""LoRA and DoRA on convolutions, as HF PEFT's ``lora.Conv1d``, ``Conv2d`` and ``Conv3d`` compute them."""

from . import dora, lora

__all__ = ["dora", "lora"]

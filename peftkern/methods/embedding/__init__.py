"""LoRA and DoRA on embeddings, as HF PEFT's ``lora.Embedding`` computes them."""

from . import dora, lora

__all__ = ["dora", "lora"]

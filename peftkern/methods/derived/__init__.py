"""Methods whose adapter is such a branch too, but lora_A and lora_B are made of its parameters, anew at every call."""

from . import hra, lily, miss, tinylora, unilora, vblora

__all__ = ["hra", "lily", "miss", "tinylora", "unilora", "vblora"]

"""Methods whose adapter is such a branch too, but lora_A and lora_B are made of its parameters, anew at every call."""

from . import hra, loha, miss, tinylora, unilora

__all__ = ["hra", "loha", "miss", "tinylora", "unilora"]

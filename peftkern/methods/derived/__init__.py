"""Methods whose adapter is such a branch too, but lora_A and lora_B are made of its parameters, anew at every call."""

from . import bdlora, deft, gralora, hra, lily, loha, miss, psoft, randlora, tinylora, unilora, vblora

__all__ = [
    "bdlora", "deft", "gralora", "hra", "lily", "loha", "miss", "psoft", "randlora", "tinylora", "unilora", "vblora",
]  # fmt: skip

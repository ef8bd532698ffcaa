"""Such a branch, whose lora_A and lora_B are made of other parameters at every call."""

from . import bdlora, deft, gralora, hra, lily, loha, miss, peanut, psoft, randlora, tinylora, unilora, vblora

__all__ = [
    "bdlora", "deft", "gralora", "hra", "lily", "loha", "miss", "peanut", "psoft", "randlora", "tinylora", "unilora", "vblora",
]  # fmt: skip

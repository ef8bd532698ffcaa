"""Methods whose adapter is such a branch too, but lora_A and lora_B are made of its parameters, anew at every call."""

from . import bdlora, deft, gralora, hra, loha, miss, psoft, randlora, tinylora, unilora

__all__ = ["bdlora", "deft", "gralora", "hra", "loha", "miss", "psoft", "randlora", "tinylora", "unilora"]

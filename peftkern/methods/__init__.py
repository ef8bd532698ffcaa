"""The methods that this package serves, a file each, in folders by what they do to a layer.

``registry`` says what an entry is; ``linear`` is the equation that entries of family L share; ``tuner`` reads HF PEFT's layers.
"""

from . import convolution, derived, embedding, folded, kronecker, low_rank, residual, rotation, scale
from .registry import METHODS, Held, Method, Plan, method_of, register
from .residual import STREAM, StreamMethod

# The functional forms, by name.
FUNCTIONS = {m.function.__name__: m.function for m in METHODS.values() if m.function is not None}

__all__ = [
    "FUNCTIONS",
    "METHODS",
    "STREAM",
    "Held",
    "Method",
    "Plan",
    "StreamMethod",
    "convolution",
    "derived",
    "embedding",
    "folded",
    "kronecker",
    "low_rank",
    "method_of",
    "register",
    "residual",
    "rotation",
    "scale",
]

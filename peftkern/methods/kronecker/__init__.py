"""A structured change of the weight, multiplied with x without ever being formed."""

from . import c3a, lokr

__all__ = ["c3a", "lokr"]

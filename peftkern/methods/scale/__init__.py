"""Vectors that scale or shift what the base takes or gives."""

from . import beft, ia3, ssf

__all__ = ["beft", "ia3", "ssf"]

"""Methods whose change of the weight has a structure that its product with x is made by, without the matrix itself."""

from . import c3a, lokr

__all__ = ["c3a", "lokr"]

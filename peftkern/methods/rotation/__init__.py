"""What a layer takes is rotated, in blocks of columns."""

from . import boft, oft

__all__ = ["boft", "oft"]

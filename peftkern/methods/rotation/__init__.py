"""Methods that rotate what a layer takes, in blocks of columns."""

from . import boft, oft

__all__ = ["boft", "oft"]

"""What a layer takes or gives is rotated, in blocks of columns."""

from . import boft, oft, road

__all__ = ["boft", "oft", "road"]

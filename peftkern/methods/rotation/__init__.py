"""Methods that rotate what a layer takes or gives, in blocks of columns."""

from . import boft, oft, road

__all__ = ["boft", "oft", "road"]

"""Methods that change the weight itself, which is folded once a step."""

from . import fourierft, frod, glora, hira, shira, waveft

__all__ = ["fourierft", "frod", "glora", "hira", "shira", "waveft"]

"""Methods that change the weight itself, which is folded once a step."""

from . import fourierft, glora, hira, shira, waveft

__all__ = ["fourierft", "glora", "hira", "shira", "waveft"]

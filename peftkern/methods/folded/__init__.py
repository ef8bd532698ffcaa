"""Methods that change the weight itself, which is folded once a step, or make their adapter of it."""

from . import fourierft, glora, hira, peanut, shira, waveft

__all__ = ["fourierft", "glora", "hira", "peanut", "shira", "waveft"]

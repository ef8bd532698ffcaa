"""Methods that change the weight itself, which is folded once a step, or make their adapter of it."""

from . import fourierft, frod, glora, hira, peanut, shira, waveft

__all__ = ["fourierft", "frod", "glora", "hira", "peanut", "shira", "waveft"]

"""Another weight, made once a step."""

from . import fourierft, frod, glora, hira, shira, waveft

__all__ = ["fourierft", "frod", "glora", "hira", "shira", "waveft"]

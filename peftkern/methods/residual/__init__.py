"""What is added to a hidden state is made of that state alone: adapters in the residual stream."""

from . import bottleneck, reft
from .stream import STREAM, StreamMethod

__all__ = ["STREAM", "StreamMethod", "bottleneck", "reft"]

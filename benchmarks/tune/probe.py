"""How the limit of a name is tried out (least.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

# A model, and what it is called with.
Call = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Probe:
    """``amounts`` of work, and for one of them the calls that do so much."""

    name: str
    amounts: tuple[int, ...]
    calls: Callable[[int], Iterable[Call]]


def powers(first: int, end: int) -> tuple[int, ...]:
    """2^first up to 2^end, which is left out."""
    return tuple(1 << k for k in range(first, end))

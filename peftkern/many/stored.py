"""What a bank knows of each adapter that it holds."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from ..activations import CODES
from ..ops.adapter_table import PHI
from .chunks import Range


@dataclass(slots=True, eq=False)
class Matrices:
    """A and B^T in memory of the bank, copied from tensors that ``key`` describes, and how many adapters they serve."""

    key: Hashable
    rank: int
    memory: Range
    users: int = 1


class Stored(NamedTuple):
    """An adapter of a bank: its id, and where its parts lie."""

    number: int
    matrices: Matrices | None
    vectors: Range | None
    offsets: dict[str, int]  # by symbol, in the chunk
    beside: str | None  # see AdapterTable
    activation: int  # its code

    @property
    def symbols(self) -> set[str]:
        """What acts in it."""
        return {*self.offsets, *[PHI] * (self.activation > 0)}

    @property
    def how(self) -> str:
        """The name of its activation."""
        return tuple(CODES)[self.activation]

    @property
    def rank(self) -> int:
        """0 without matrices."""
        return 0 if self.matrices is None else self.matrices.rank

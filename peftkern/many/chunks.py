"""Memory that never moves: ranges of a few large tensors, given out and taken back.

A range that is taken back may still be read by a call that started before. So it is *retired* together with the object
that such calls hold (of a snapshot), and given out again only when that object and all earlier ones are gone.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.cpu.native import _C
from ..dispatch.watch import nobody_watches

# Elements; every range starts at a multiple, so that its rows are aligned for vectors.
_ALIGN = 16
# Elements of a chunk, at least: small adapters share one. A further chunk adds half of what there is, but no more than
# the second number, or a sixteenth: a bank with little in it is small, and one with much in it has few chunks.
_LEAST, _GROWTH = 1 << 17, 1 << 22


def _aligned(size: int) -> int:
    return -(-max(size, 1) // _ALIGN) * _ALIGN


class Range(NamedTuple):
    """``size`` elements from ``offset`` of chunk number ``chunk``."""

    chunk: int
    offset: int
    size: int


class Chunks:
    """The best fitting free range, or a new chunk. Not thread-safe: the owner holds a lock.

    ``most``: elements that can be needed at a time, beyond which chunks have no more than what is asked for. ``idle``
    waits until nothing that was started before reads any more; called before memory is used again.
    """

    def __init__(self, most: int, dtype: torch.dtype, device: torch.device, idle: Callable[[], None] = lambda: None):
        self.most, self.dtype, self.device, self.idle = most, dtype, device, idle
        self.tensors: list[Tensor] = []  # replaced when one is added: a table keeps the list that it was given
        self.allocated = 0  # elements of all chunks
        # Free ranges, neighbours merged: sorted as (size, chunk, offset), and found by either end.
        self.free: list[tuple[int, int, int]] = []
        self._size_at: dict[tuple[int, int], int] = {}
        self._start_of: dict[tuple[int, int], int] = {}
        self._retired: deque[tuple[weakref.ref, Sequence[Range]]] = deque()

    def take(self, size: int) -> Range:
        """A range of at least ``size`` elements, contents undefined; a new chunk if no free one fits."""
        size = _aligned(size)
        found = self._fitting(size) if self._has(size) else self._new(size)
        if found.size > size:
            self._insert(Range(found.chunk, found.offset + size, found.size - size))
        return Range(found.chunk, found.offset, size)

    def reserve(self, size: int) -> None:
        """Have a free range of ``size`` elements."""
        if size and not self._has(size):
            self._insert(self._new(_aligned(size)))

    def give_back(self, ranges: Sequence[Range]) -> None:
        """The ranges are free at once: nobody reads them."""
        for chunk, offset, size in ranges:
            start = self._start_of.get((chunk, offset))
            if start is not None:
                size += self._remove(chunk, start)
                offset = start
            if (chunk, offset + size) in self._size_at:
                size += self._remove(chunk, offset + size)
            self._insert(Range(chunk, offset, size))

    def retire(self, ranges: Sequence[Range], held: weakref.ref) -> None:
        """The ranges are free once the object that ``held`` refers to, and those of all calls before, are gone.

        To be called for every snapshot when the next one takes its place, even with no ranges: what is retired later
        may be seen by it too.
        """
        if ranges or held() is not None:
            self._retired.append((held, ranges))

    def _has(self, size: int) -> bool:
        """Whether a free range has ``size`` elements; what was retired is looked at where none has."""
        if self.free and self.free[-1][0] >= size:
            return True
        ranges: list[Range] = []
        while self._retired and self._retired[0][0]() is None:
            ranges += self._retired.popleft()[1]
        if not ranges:
            return False
        self.idle()
        self.give_back(ranges)
        return self.free[-1][0] >= size

    def _new(self, size: int) -> Range:
        growth = max(_LEAST, min(self.allocated // 2, _GROWTH), self.allocated // 16)
        # A multiple of what is asked for leaves no rest when adapters are alike.
        size = max(size, min(-(-growth // size) * size, self.most - self.allocated))
        # A chunk is one tensor for good: it belongs to no inference_mode block.
        with torch.inference_mode(False):
            tensor = torch.empty(size, dtype=self.dtype, device=self.device)
        if tensor.is_cpu and _C is not None and nobody_watches():
            _C.ask_huge_pages(tensor.data_ptr(), tensor.nbytes)
        self.tensors = [*self.tensors, tensor]
        self.allocated += size
        return Range(len(self.tensors) - 1, 0, size)

    def _fitting(self, size: int) -> Range:
        _, chunk, offset = self.free[bisect_left(self.free, (size,))]
        return Range(chunk, offset, self._remove(chunk, offset))

    def _insert(self, r: Range) -> None:
        insort(self.free, (r.size, r.chunk, r.offset))
        self._size_at[r.chunk, r.offset] = r.size
        self._start_of[r.chunk, r.offset + r.size] = r.offset

    def _remove(self, chunk: int, offset: int) -> int:
        size = self._size_at.pop((chunk, offset))
        del self._start_of[chunk, offset + size]
        del self.free[bisect_left(self.free, (size, chunk, offset))]
        return size

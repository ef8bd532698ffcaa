"""Memory that never moves: ranges of a few large tensors, given out and taken back.

A range that is taken back may still be read by a call that started before. So it is *retired* together with the object
that such calls hold (a snapshot), and given out again only when that object and all earlier ones are gone.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

# Elements; every range starts at a multiple, so that its rows are aligned for vectors.
_ALIGN = 16


class Range(NamedTuple):
    """``size`` elements from ``offset`` of chunk number ``chunk``."""

    chunk: int
    offset: int
    size: int


class Chunks:
    """First fit in chunks of at least ``chunk_size`` elements. Not thread-safe: the owner holds a lock."""

    def __init__(self, chunk_size: int, dtype: torch.dtype, device: torch.device):
        self.chunk_size, self.dtype, self.device = chunk_size, dtype, device
        self.tensors: tuple[torch.Tensor, ...] = ()
        self._free: list[Range] = []  # sorted, neighbours merged
        self._retired: deque[tuple[Callable[[], bool], list[Range]]] = deque()

    @property
    def allocated(self) -> int:
        """Elements of all chunks."""
        return sum(t.numel() for t in self.tensors)

    def take(self, size: int) -> Range:
        """A range of at least ``size`` elements, contents undefined; a new chunk if no free one fits."""
        size = -(-max(size, 1) // _ALIGN) * _ALIGN
        self._reclaim()
        index = next((i for i, r in enumerate(self._free) if r.size >= size), None)
        if index is None:
            # A chunk is one tensor for good: it belongs to no inference_mode block.
            with torch.inference_mode(False):
                tensor = torch.empty(max(size, self.chunk_size), dtype=self.dtype, device=self.device)
            self.tensors += (tensor,)
            self._free.append(Range(len(self.tensors) - 1, 0, tensor.numel()))
            index = len(self._free) - 1
        found = self._free.pop(index)
        if found.size > size:
            self._free.insert(index, Range(found.chunk, found.offset + size, found.size - size))
        return Range(found.chunk, found.offset, size)

    def give_back(self, ranges: list[Range]) -> None:
        """The ranges are free at once: nobody reads them."""
        for r in ranges:
            self._free.append(r)
        self._free.sort()
        merged: list[Range] = []
        for r in self._free:
            last = merged[-1] if merged else None
            if last is not None and last.chunk == r.chunk and last.offset + last.size == r.offset:
                merged[-1] = Range(last.chunk, last.offset, last.size + r.size)
            else:
                merged.append(r)
        self._free = merged

    def retire(self, ranges: list[Range], snapshot: object, idle: Callable[[], bool] = lambda: True) -> None:
        """The ranges are free once ``snapshot`` and all retired before it are gone, and ``idle()`` is true.

        Every snapshot must be retired when the next one takes its place, in that order, even with no ranges.
        """
        ref = weakref.ref(snapshot)
        self._retired.append((lambda: ref() is None and idle(), ranges))

    def _reclaim(self) -> None:
        while self._retired and self._retired[0][0]():
            self.give_back(self._retired.popleft()[1])

"""Chunks: ranges of memory that never moves, given out, taken back, and used again when nobody reads them."""

from __future__ import annotations

import gc
import random
import weakref
from itertools import pairwise

import torch

from peftkern.many.chunks import Chunks, Range


class Snapshot:
    """Something to hold."""


def chunks_of(size: int, **kw) -> Chunks:
    """One chunk, all of it free."""
    chunks = Chunks(size, torch.float32, torch.device("cpu"), **kw)
    chunks.reserve(size)
    assert chunks.allocated == size
    return chunks


def test_chunks_wait_for_every_earlier_snapshot():
    waits = []
    chunks = chunks_of(64, idle=lambda: waits.append(None))
    first, second = Snapshot(), Snapshot()
    a, b = chunks.take(32), chunks.take(32)
    chunks.retire([a], weakref.ref(first))
    chunks.retire([b], weakref.ref(second))
    del second
    assert chunks.take(32).chunk == 1 and not waits, "the first snapshot still shows what the second gave up"
    del first
    gc.collect()
    assert {chunks.take(32), chunks.take(32)} == {a, b}
    assert len(waits) == 1, "the device is waited for once"


def test_a_snapshot_without_ranges_counts_too():
    chunks, held = chunks_of(32), Snapshot()
    a = chunks.take(32)
    chunks.retire([], weakref.ref(held))
    chunks.retire([a], weakref.ref(Snapshot()))
    assert chunks.take(32).chunk == 1
    del held
    assert chunks.take(32) == a


def test_chunks_merge_and_split():
    chunks = chunks_of(160)
    parts = [chunks.take(n) for n in (1, 17, 48, 64)]
    assert [p.offset for p in parts] == [0, 16, 48, 96] and chunks.allocated == 160
    chunks.give_back([parts[2], parts[0], parts[1]])
    assert chunks.take(96).offset == 0 and chunks.take(200).chunk == 1


def test_ranges_never_overlap_and_nothing_is_lost():
    choose, chunks, taken = random.Random(0), chunks_of(1 << 12), []
    for _ in range(3000):
        if taken and choose.random() < 0.5:
            chunks.give_back([taken.pop(choose.randrange(len(taken)))])
        else:
            size = choose.randint(1, 600)
            taken.append(chunks.take(size))
            assert taken[-1].size >= size
    ranges = sorted([*taken, *(Range(chunk, offset, size) for size, chunk, offset in chunks.free)])
    for one, two in pairwise(ranges):
        assert two.offset == (one.offset + one.size if two.chunk == one.chunk else 0)
    assert sum(r.size for r in ranges) == chunks.allocated
    chunks.give_back(taken)
    assert sorted(size for size, _, _ in chunks.free) == sorted(t.numel() for t in chunks.tensors)

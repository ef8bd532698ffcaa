"""Chunks: ranges of memory that never moves, given out, taken back, and used again when nobody reads them."""

from __future__ import annotations

import gc
import mmap
import random
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from peftkern.backends.cpu.native import _C
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


def _flags(address: int) -> list[str]:
    """What Linux says of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            begin, end = (int(x, 16) for x in words[0].split("-"))
            inside = begin <= address < end
        elif inside and words[0] == "VmFlags:":
            return words[1:]
    return []


@pytest.mark.skipif(_C is None, reason="the C++ extension is not built")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="no large pages here")
def test_a_large_chunk_asks_for_large_pages():
    block = 2 << 20
    chunks = chunks_of(4 * block)
    chunk = chunks.tensors[0]
    assert "hg" in _flags(chunk.data_ptr() + chunk.nbytes // 2)
    plain = torch.frombuffer(mmap.mmap(-1, 16 * block), dtype=torch.float32)  # of its own: freed memory keeps its flags
    assert "hg" not in _flags(plain.data_ptr() + plain.nbytes // 2)
    _C.ask_huge_pages(plain.data_ptr(), block // 2)  # holds no whole block
    assert "hg" not in _flags(plain.data_ptr() + plain.nbytes // 2)
    with pytest.raises(ValueError, match="null pointer"):
        _C.ask_huge_pages(0, 1)

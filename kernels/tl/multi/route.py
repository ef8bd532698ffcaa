"""What a device must know before the first many-adapter kernel, made without waiting for it: route and addresses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..configs import cdiv
from .tiles import COLUMNS, ID

_BLOCK = 128


@triton.jit(do_not_specialize=["M", "slots", "mask"])
def multi_segment_kernel(segments, ids, table, M, slots, mask, BLOCK: tl.constexpr):
    """The segment of each row: a slot, ``slots`` for -1, ``slots + 1`` for an id that no slot answers to."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(ids + at, mask=at < M, other=-1).to(tl.int64)
    slot = number & tl.cast(mask, tl.int64)
    known = (number >= 0) & (slot < slots)
    answers = tl.load(table + slot * COLUMNS + ID, mask=known, other=-1)
    segment = tl.where(known & (answers == number), slot, tl.where(number == -1, slots, slots + 1))
    tl.store(segments + at, segment.to(tl.int32), mask=at < M)


def route(ids: Tensor, table: Tensor, mask: int) -> tuple[Tensor, Tensor]:
    """(order, starts) of ``peftkern.ops.multi_lora_linear``; an invalid id is in the last segment, nothing is raised."""
    ids, table = ids.reshape(-1).contiguous(), table.contiguous()
    M, slots = ids.numel(), table.shape[0]
    segments = torch.empty(M, dtype=torch.int32, device=ids.device)
    args = dict(segments=segments, ids=ids, table=table, M=M, slots=slots, mask=mask)
    launch.submit(launch.Launch(multi_segment_kernel, (cdiv(M, _BLOCK),), args, dict(BLOCK=_BLOCK)))
    ordered, order = torch.sort(segments, stable=True)
    first = torch.arange(slots + 3, dtype=torch.int32, device=ids.device)
    return order.to(torch.int32), torch.searchsorted(ordered, first, out_int32=True)


_POINTERS = [f"w{i}" for i in range(16)]


@triton.jit(do_not_specialize=["first", "count", *_POINTERS])
def multi_address_kernel(
    addresses, w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15, first, count
):  # fmt: skip
    """addresses[first + i] = the address of w_i for i < count."""
    addresses += first
    tl.store(addresses, w0.to(tl.int64), mask=0 < count)
    tl.store(addresses + 1, w1.to(tl.int64), mask=1 < count)
    tl.store(addresses + 2, w2.to(tl.int64), mask=2 < count)
    tl.store(addresses + 3, w3.to(tl.int64), mask=3 < count)
    tl.store(addresses + 4, w4.to(tl.int64), mask=4 < count)
    tl.store(addresses + 5, w5.to(tl.int64), mask=5 < count)
    tl.store(addresses + 6, w6.to(tl.int64), mask=6 < count)
    tl.store(addresses + 7, w7.to(tl.int64), mask=7 < count)
    tl.store(addresses + 8, w8.to(tl.int64), mask=8 < count)
    tl.store(addresses + 9, w9.to(tl.int64), mask=9 < count)
    tl.store(addresses + 10, w10.to(tl.int64), mask=10 < count)
    tl.store(addresses + 11, w11.to(tl.int64), mask=11 < count)
    tl.store(addresses + 12, w12.to(tl.int64), mask=12 < count)
    tl.store(addresses + 13, w13.to(tl.int64), mask=13 < count)
    tl.store(addresses + 14, w14.to(tl.int64), mask=14 < count)
    tl.store(addresses + 15, w15.to(tl.int64), mask=15 < count)


_known: dict[tuple, Tensor] = {}


def _write_addresses(tensors: list[Tensor], device: torch.device) -> Tensor:
    addresses = torch.empty(max(len(tensors), 1), dtype=torch.int64, device=device)
    for first in range(0, len(tensors), len(_POINTERS)):
        some = tensors[first : first + len(_POINTERS)]
        pointers = dict(zip(_POINTERS, some + some[:1] * (len(_POINTERS) - len(some)), strict=True))
        args = dict(addresses=addresses, **pointers, first=first, count=len(some))
        launch.submit(launch.Launch(multi_address_kernel, (1,), args, {}, 1))
    return addresses


def addresses_of(tensors: list[Tensor], device: torch.device, keep: bool) -> Tensor:
    """int64: where each tensor begins on its device, 0 for an empty one. One element at least.

    Pointers go to a kernel as arguments: a copy from the host would make it wait, and could not be captured. ``keep``:
    what was written before is used again, by the stream that wrote it. In a capture everything is written anew, since a
    graph's memory means nothing outside of it.
    """
    stream = 0
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        keep = keep and not torch.cuda.is_current_stream_capturing()
    if not keep or device.type == "meta":
        return _write_addresses(tensors, device)
    key = (device, stream, *(t.data_ptr() for t in tensors))
    if key not in _known:
        if len(_known) >= 4096:
            _known.clear()
        _known[key] = _write_addresses(tensors, device)
    return _known[key]

"""Tensors as the CUDA launchers take them, the device that they lie on, and scratch. No decisions beyond those."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

try:
    from ... import _C
except ImportError:
    _C = None

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HALVES = (torch.bfloat16, torch.float16)
NO_MATRIX = (0, 0, 0, 1)
NO_DROPOUT = (0, 0, 1.0)


class Device(NamedTuple):
    """``arch`` is major * 10 + minor."""

    arch: int
    multiprocessors: int

    @property
    def overlaps(self) -> bool:
        """Whether a launch may start before the one that it depends on has ended."""
        return self.arch >= 90


@functools.cache
def _device(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    return Device(p.major * 10 + p.minor, p.multi_processor_count)


def device(t: Tensor) -> Device:
    """What launchers must know of the device of ``t``."""
    return _device(t.device.index)


def on_device(t: Tensor):
    """Launches go to the current device."""
    return torch.cuda.device(t.device)


def stream(t: Tensor) -> int:
    """The current stream of the device of ``t``."""
    return torch.cuda.current_stream(t.device).cuda_stream


def capturing() -> bool:
    """Whether launches of now become a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


def pointer(t: Tensor | None) -> int:
    """Address, 0 for None."""
    return 0 if t is None else t.data_ptr()


def matrix(t: Tensor | None) -> tuple[int, int, int, int]:
    """(address, dtype code, row stride, column stride) of a 2-D tensor."""
    return NO_MATRIX if t is None else (t.data_ptr(), CODES[t.dtype], *t.stride())


def dropout(p: float, seed: Tensor | None) -> tuple[int, int, float]:
    """(address of the seed, threshold, scale of what is kept); the seed's value is read by the kernel."""
    return NO_DROPOUT if p == 0.0 else (seed.data_ptr(), int(p * 2.0**32), 1.0 / (1.0 - p))


def rows(t: Tensor) -> Tensor:
    """``t`` (rows, columns) with adjacent columns; copied if they are not."""
    if t.stride(1) == 1 and t.stride(0) >= t.shape[1]:
        return t
    # Strides of an axis of length 1 mean nothing; contiguous() keeps them.
    return t.contiguous() if min(t.shape) > 1 else torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)


def vector(t: Tensor | None) -> Tensor | None:
    """A scale vector in contiguous fp32."""
    return None if t is None else t.to(torch.float32).contiguous()


def floats(count: int, like: Tensor) -> Tensor | None:
    """Scratch for partial sums on the device of ``like``."""
    return torch.empty(count, dtype=torch.float32, device=like.device) if count else None


kept_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(words: int, like: Tensor) -> Tensor:
    """At least so many 32-bit zeros, which every kernel that takes them leaves as zeros.

    One launch at a time may use them: they are kept per stream, and a graph, which may be replayed on any stream, gets
    its own, zeroed by the graph.
    """
    if capturing():
        return torch.zeros(words, dtype=torch.int32, device=like.device)
    key = like.device, stream(like)
    kept = kept_counters.get(key)
    if kept is None or kept.numel() < words:
        kept = kept_counters[key] = torch.zeros(
            max(1024, 1 << (words - 1).bit_length()), dtype=torch.int32, device=like.device
        )
    return kept


kept_addresses: dict[tuple, Tensor] = {}


def addresses(tensors: list[Tensor], like: Tensor) -> Tensor:
    """int64 on the device of ``like``: where each tensor begins. Kept for the stream that wrote them; a graph's are its own."""

    def write() -> Tensor:
        out = torch.empty(max(1, len(tensors)), dtype=torch.int64, device=like.device)
        _C.cuda_store_addresses([t.data_ptr() for t in tensors], out.data_ptr(), stream(like))
        return out

    if capturing():
        return write()
    key = like.device, stream(like), *(t.data_ptr() for t in tensors)
    if key not in kept_addresses:
        if len(kept_addresses) >= 4096:
            kept_addresses.clear()
        kept_addresses[key] = write()
    return kept_addresses[key]

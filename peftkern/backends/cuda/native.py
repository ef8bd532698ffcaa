"""Where a call runs and in which layout its tensors go to the CUDA kernels. No decisions beyond those."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import marshal

try:
    from ... import _C
except ImportError:
    _C = None

HALVES = (torch.bfloat16, torch.float16)


class Device(NamedTuple):
    """``arch`` is major * 10 + minor."""

    arch: int
    multiprocessors: int


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


# What outlives a call, by device, stream and contents: 32-bit zeros, which every kernel that takes them leaves as zeros,
# and addresses of tensors in the device's memory. The native calls fill both (csrc/bindings/cuda/pass.h).
kept_counters: dict[bytes, Tensor] = {}
kept_addresses: dict[bytes, Tensor] = {}


def start(entry, like: Tensor, *args, into: Tensor | None = None):
    """The result of one native call on the device of ``like``. ``into``: what it adds to.

    What is no plain tensor is copied: rare, and never wrong.
    """
    here = (*device(like), stream(like), capturing(), kept_counters, kept_addresses)
    given = args if into is None else (into, *args)
    done = entry(here, *given)
    if done is None:
        given = marshal.copied(given)
        done = entry(here, *given)
        if done is None:
            raise RuntimeError("the C++ extension takes no call like this one: arguments do not fit")
        if into is not None:
            into.copy_(given[0])
    return done


def rows(t: Tensor) -> Tensor:
    """``t`` (rows, columns) with adjacent columns; copied if they are not."""
    if t.stride(1) == 1 and t.stride(0) >= t.shape[1]:
        return t
    # Strides of an axis of length 1 mean nothing; contiguous() keeps them.
    return t.contiguous() if min(t.shape) > 1 else torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)


def weight(t: Tensor) -> Tensor:
    """``t`` with adjacent columns or adjacent rows; copied if there are neither."""
    return t if t.stride(0) == 1 and t.stride(1) >= t.shape[0] else rows(t)


def vectors(scales: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Scale vectors in contiguous fp32."""
    return tuple(None if t is None else t.to(torch.float32).contiguous() for t in scales)

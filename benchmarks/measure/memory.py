"""Bytes saved for the backward pass, and the peak of a whole step.

Saved bytes are the distinct storages that autograd packs during the forward pass, parameters and frozen weights
apart: x counts, once, however many nodes hold it. On CPU the peak is the process's resident memory (Linux), so that
scratch that torch's allocator does not see is counted; it is what a step adds to the memory in use before it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re

import torch
from torch import Tensor

from ..core.case import Step


def saved_bytes(step: Step, i: int = 0) -> int:
    """Bytes that one forward pass keeps for the backward pass."""
    ours = {storage.data_ptr() for t in step.frozen for storage in _storages(t)}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        for storage in _storages(tensor):
            if storage.data_ptr() not in ours:
                seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = step.forward(i)  # kept until the count is made: storages that are freed could share an address
    del y
    return sum(seen.values())


# What the tensors of sparse layouts are made of.
_PARTS = {torch.sparse_coo: ("_indices", "_values"), torch.sparse_csr: ("crow_indices", "col_indices", "values")}


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    parts = [getattr(tensor, name)() for name in _PARTS.get(tensor.layout, ())] or [tensor]
    return [part.untyped_storage() for part in parts]


def peak_bytes(step: Step, i: int = 0, backward: bool = True) -> int | None:
    """Most memory that one step takes beyond what was in use before; None where that cannot be measured."""
    if step.dy[i].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(step, i, backward)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _trim_heap()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak
        before = _status("VmRSS")
        _step(step, i, backward)
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _step(step: Step, i: int, backward: bool) -> None:
    y = step.forward(i)
    if backward:
        torch.autograd.grad(y, step.leaves[i], step.dy[i])


def _trim_heap() -> None:
    # Memory that the C library keeps after a free would hide what the step allocates.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    with open(f"/proc/{os.getpid()}/status") as file:
        return int(re.search(rf"^{field}:\s+(\d+) kB", file.read(), re.M)[1]) * 1024

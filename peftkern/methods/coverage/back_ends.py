"""Which back ends have kernels for an op with given coefficients: asked of them, for a layer on the device they are for."""

from __future__ import annotations

import torch

from ...dispatch.choose import BACKENDS, load
from ...dispatch.registry import OPS
from ...problem import DTYPES, Problem
from ...settings import Settings
from ..entry import Entry

_SIZES = {"N": 1024, "K": 1024, "R": 16}
_DEVICES = {"cpu": ("cpu", "AVX2"), "triton": ("cuda", "sm_90"), "cuda": ("cuda", "sm_90")}


def dtypes(name: str, op: str, flags: frozenset[str], rows: int = 512) -> list[str]:
    """The words for dtypes of activations and adapters in which this back end has a kernel for the op. ``flags``: as those
    of a Problem. What this machine or this build lacks does not matter."""
    module, (device, arch) = load(name), _DEVICES[name]

    def takes(dtype: torch.dtype) -> bool:
        problem = Problem(op, device, arch, dtype, dtype, rows, **_SIZES, flags=flags)
        return op in module.OPS and module.decline(problem, Settings()) is None

    return [word for word, dtype in DTYPES.items() if takes(dtype)]


def of(entry: Entry) -> list[str]:
    """The back ends of a method beside the reference, which computes all; ``(forward)`` where they do not train it, and
    ``torch`` alone where all is torch's own operations."""
    if f"{entry.op}_fwd" not in OPS:
        return ["torch"]
    (forward, backward), found = entry.flags, []
    for name in BACKENDS:
        if dtypes(name, f"{entry.op}_fwd", forward):
            trains = entry.trains and dtypes(name, f"{entry.op}_bwd", backward)
            found.append(name if trains else f"{name} (forward)")
    return found

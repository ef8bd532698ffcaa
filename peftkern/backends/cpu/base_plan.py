"""In which blocks a base product of ours is computed on CPU. Who computes it: peftkern/dispatch/cpu_base.py."""

from __future__ import annotations

import functools
from typing import NamedTuple

from .native import _C

# Whatever the layer, the scratch of one product stays under this.
SCRATCH_BYTES = 64 << 20


class Plan(NamedTuple):
    """How a product is computed. ``rows`` x ``cols`` is the panel that the epilogue gets at a time."""

    kind: str
    rows: int
    cols: int
    block_rows: int = 1
    block_cols: int = 1
    scratch: int = 0  # floats, without the panel
    panel: int = 0  # floats

    @property
    def bytes(self) -> int:
        """All scratch of the product."""
        return 4 * (self.scratch + self.panel)


@functools.lru_cache(maxsize=4096)
def blocks(kind: str, M: int, D: int, C: int, threads: int) -> Plan:
    """The plan of ``kind``; M, D, C >= 1. ``Plan.bytes`` never exceeds SCRATCH_BYTES."""
    if kind == "vendor":
        return Plan(kind, M, D)
    return Plan(kind, *_C.base_blocks(kind, M, D, C, threads))

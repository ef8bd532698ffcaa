"""In which blocks a base product of ours is computed on CPU. Who computes it: peftkern/dispatch/cpu_base.py."""

from __future__ import annotations

import functools
from typing import NamedTuple

from .native import _C

# Whatever the layer, the scratch of one product stays under this.
SCRATCH_BYTES = 64 << 20
# Elements of an fp32 panel of the output: 4 MB stay in a last-level cache, and a call per panel is not felt.
_PANEL = 1 << 20
_PANEL_COLS = 1024
# What one thread computes at a time. Packing is repeated for every block, so it is about 1 % per 1,024 columns (for a)
# and 3 % per 1,024 rows (for W, which is transposed); larger blocks leave threads idle at the end.
_BLOCK_ROWS, _BLOCK_COLS = 1024, 512
_ALIGN = 32  # columns; a multiple of every level's tile, and of what the branch kernel needs
_FEW_SCRATCH = 4 << 20  # floats of fp32 copies of a


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


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _even(n: int, most: int, multiple: int) -> int:
    """Size of the parts if n is cut into as few as ``most`` allows, all alike."""
    return _up(-(-n // -(-n // most)), multiple)


@functools.lru_cache(maxsize=4096)
def blocks(kind: str, M: int, D: int, C: int, threads: int) -> Plan:
    """The plan of ``kind``; M, D, C >= 1. ``Plan.bytes`` never exceeds SCRATCH_BYTES."""
    if kind == "vendor":
        return Plan(kind, M, D)
    # More threads need more to share out.
    elements = _PANEL * min(max(threads // 2, 1), 4)
    rows = _even(M, _BLOCK_ROWS, 1)
    cols = min(_up(D, _ALIGN), _even(D, max(_PANEL_COLS, elements // rows), _ALIGN))
    panel = rows * (cols + 16)
    if kind == "few":
        return Plan(kind, rows, cols, scratch=M * (C + _ALIGN), panel=panel)
    block_rows, block_cols = min(rows, _BLOCK_ROWS), min(cols, _BLOCK_COLS)
    while _uneven(rows, cols, block_rows, block_cols, threads) and block_rows * block_cols > 64 * 128:
        if block_cols > 128 and (block_cols >= block_rows or block_rows <= 64):
            block_cols = _up(block_cols // 2, _ALIGN)
        else:
            block_rows = -(-block_rows // 2)
    while 4 * (threads * _per_thread(block_rows, block_cols) + panel) > SCRATCH_BYTES:
        if block_cols > block_rows:
            block_cols = _up(block_cols // 2, _ALIGN)
        else:
            block_rows = -(-block_rows // 2)
    return Plan(kind, rows, cols, block_rows, block_cols, threads * _per_thread(block_rows, block_cols), panel)


def _per_thread(block_rows: int, block_cols: int) -> int:
    return block_rows * _C.base_row + (block_cols + _C.base_tile_cols) * _C.base_block


def _uneven(rows: int, cols: int, block_rows: int, block_cols: int, threads: int) -> bool:
    """Whether threads would wait for each other for more than a fifth of the time."""
    count = -(-rows // block_rows) * -(-cols // block_cols)
    return -(-count // threads) * threads > 1.2 * count

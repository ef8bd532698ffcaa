"""How many blocks of a kernel fit on a multiprocessor at once: the theoretical occupancy.

Limits per multiprocessor are those of the CUDA programming guide, "Technical Specifications per Compute Capability".
Registers are given out to warps in units of 256, shared memory to blocks in units of 128 bytes, of which the system
takes 1 KiB per block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

REGISTERS, REGISTER_UNIT, SHARED_UNIT, SYSTEM_SHARED = 65536, 256, 128, 1024


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor; ``block_shared``: bytes that one block may ask for."""

    warps: int
    blocks: int
    shared: int
    block_shared: int


LIMITS = {
    80: Limits(64, 32, 164 << 10, 163 << 10),
    86: Limits(48, 16, 100 << 10, 99 << 10),
    89: Limits(48, 24, 100 << 10, 99 << 10),
    90: Limits(64, 32, 228 << 10, 227 << 10),
    100: Limits(64, 32, 228 << 10, 227 << 10),
    120: Limits(48, 24, 100 << 10, 99 << 10),
}


def limits(arch: str) -> Limits:
    """Those of ``sm_90`` or ``sm_90a``. Raises KeyError for an architecture that is not in the table."""
    return LIMITS[int(re.search(r"\d+", arch)[0])]


def blocks(arch: str, threads: int, registers: int, shared: int) -> int:
    """Blocks on a multiprocessor; 0 if not even one fits. ``shared``: static and dynamic bytes of a block."""
    of = limits(arch)
    warps = -(-threads // 32)
    if shared > of.block_shared:
        return 0
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    per_block = -(-(shared + SYSTEM_SHARED) // SHARED_UNIT) * SHARED_UNIT
    # Each of the four schedulers has a quarter of the registers.
    by_registers = 4 * (REGISTERS // 4 // per_warp) // warps
    return min(of.blocks, of.warps // warps, by_registers, of.shared // per_block)

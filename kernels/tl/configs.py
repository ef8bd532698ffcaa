"""Launch configurations: pure functions of the sizes, the element size and the architecture.

Nothing here looks at a device or a clock. ``arch`` is major * 10 + minor (90 for Hopper), 0 for the interpreter.
What is reduced over never decides with the number of rows: see the modules of the kernels.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

# Two waves of a Hopper-sized chip. A constant, so that a result does not depend on which chip of a family ran it.
TARGET_PROGRAMS = 264
SMEM_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10}
MAX_RANK = 128


def cdiv(a: int, b: int) -> int:
    """ceil(a / b)."""
    return -(-a // b)


def alignment(*values: int) -> int:
    """The largest power of two that divides all values, at most 8."""
    return math.gcd(8, *values)


def rank_block(R: int, limit: int = MAX_RANK) -> int:
    """Columns of a low-rank tile: the power of two that holds R, at least 16 (a tensor core's depth), at most limit."""
    return min(limit, max(16, 1 << max(R - 1, 0).bit_length()))


def smem_bytes(arch: int) -> int:
    """Shared memory that one program may use."""
    return SMEM_BYTES.get(arch, 99 << 10)


@dataclass(frozen=True)
class LaunchConfig:
    """``block_m`` rows, ``block_c`` columns and ``block_k`` depth of a tile; ``rank`` columns of a low-rank tile.

    ``tma``: operands through tensor descriptors. ``persistent``: one program per multiprocessor walks the tiles, 0 for
    one program per tile, else their number.
    """

    block_m: int
    block_c: int
    block_k: int = 0
    rank: int = 16
    warps: int = 4
    stages: int = 3
    group: int = 8
    tma: bool = False
    persistent: int = 0
    flatten: bool = False

    def invalid(self, itemsize: int, arch: int) -> str | None:
        """Why no kernel can be started with this, or None. The one validity rule."""
        blocks = [b for b in (self.block_m, self.block_c, self.block_k, self.rank) if b]
        if any(b < 16 or b & (b - 1) for b in blocks):
            return f"blocks must be powers of two of at least 16, got {blocks}"
        if self.warps not in (1, 2, 4, 8, 16):
            return f"warps must be a power of two up to 16, got {self.warps}"
        if self.tma and 0 < arch < 90:
            return f"tensor descriptors need sm_90, got sm_{arch}"
        tile = max(self.block_m, self.rank) * self.block_c
        if tile > 128 * 32 * self.warps:
            return f"a tile of {tile} fp32 values does not fit the registers of {self.warps} warps"
        operands = (self.block_m + self.block_c) * self.block_k or self.block_m * self.block_c
        if arch and operands * itemsize * self.stages > smem_bytes(arch):
            return f"{operands * itemsize * self.stages} bytes of operands exceed the shared memory of sm_{arch}"
        return None


def gemm(
    M: int, N: int, K: int, R: int, itemsize: int, arch: int, *, drop: bool = False, extra: bool = False
) -> LaunchConfig:
    """K1 with its own product. ``drop``: the low-rank term is dropped. ``extra``: the base is scaled, saved or reduced.

    Both cost registers, so they take smaller tiles.
    """
    rank = rank_block(R, 32)
    if itemsize == 4:
        return LaunchConfig(64, 64, 32, rank, warps=4, stages=3)
    if arch >= 90:
        if extra and (drop or arch >= 100):
            return LaunchConfig(128, 64, 64, rank, warps=8, stages=4, tma=True)
        # On sm_100 accumulators live in 512 columns of tensor memory, and two of 256 leave nothing for operands.
        if drop or extra or N <= 1024 or arch >= 100:
            return LaunchConfig(128, 128, 64, rank, warps=8, stages=3, tma=True)
        return LaunchConfig(128, 256, 64, rank, warps=8, stages=3, tma=True)
    # Without wgmma the low-rank operands sit in registers too.
    return LaunchConfig(128, 64 if drop and extra else 128, 32, 16, warps=8, stages=4 if arch == 80 else 3)


def decoding(M: int, R: int, itemsize: int, arch: int, batch_invariant: bool) -> LaunchConfig:
    """K1 with its own product of W in codes: few rows, so that decoding decides, and many tiles of columns."""
    few = M <= 16 and not batch_invariant
    if itemsize == 4:
        return LaunchConfig(16 if few else 64, 32, 32, rank_block(R, 16), warps=4, stages=3)
    if not few and (0 < arch < 90 or arch >= 100):  # without wgmma x is held in registers too
        return LaunchConfig(64, 32, 64, rank_block(R, 32), warps=4, stages=4)
    return LaunchConfig(16 if few else 64, 32, 128, rank_block(R, 32), warps=4, stages=3)


# Of scratch for W in codes, which stays in the second-level cache of the larger GPUs until it is multiplied.
PANEL_BYTES = 32 << 20


def panel(itemsize: int, arch: int) -> LaunchConfig:
    """Decoding alone: bytes decide."""
    return LaunchConfig(32, 128 if itemsize == 2 else 64, warps=4, stages=1)


def panel_columns(C: int, itemsize: int) -> int:
    """How many of a result a panel for a sum over C is: a multiple of 128, whatever C is at least that."""
    return max(128, PANEL_BYTES // (C * itemsize) // 128 * 128)


def epilogue(M: int, N: int, R: int, itemsize: int, arch: int) -> LaunchConfig:
    """K1 around a base that is read: bytes decide, so many small tiles."""
    return LaunchConfig(32 if M <= 64 else 64, 128, 0, rank_block(R, 32), warps=8, stages=1)


def shrink(K: int, R: int, itemsize: int, arch: int) -> LaunchConfig:
    """u = x A^T. Never a function of M: the blocks of the sum over K must not be."""
    rank = rank_block(R)
    if itemsize == 4:
        return LaunchConfig(64, min(rank, 64), 32, min(rank, 64), warps=4, stages=3)
    if arch < 90:
        # Here, and on sm_100, the terms of A and the product's operands are held in registers.
        return LaunchConfig(64, min(rank, 32), 64 if rank == 16 else 32, min(rank, 32), warps=4, stages=4)
    warps, stages = (4, 4) if rank <= 64 else (8, 3)
    deep = rank <= (32 if arch < 100 else 16)
    return LaunchConfig(64, rank, 128 if deep else 64, rank, warps=warps, stages=stages)


def shrink_groups(M: int, K: int, R: int, config: LaunchConfig) -> int:
    """Programs that share a row tile's blocks; 1: one program adds them all."""
    programs = cdiv(M, config.block_m) * cdiv(R, config.rank)
    blocks = cdiv(K, config.block_k)
    return 1 if programs >= 96 else max(1, min(blocks, cdiv(TARGET_PROGRAMS, programs)))


def fuse_down(R: int) -> bool:
    """Whether du comes out of the pass that makes dB. Its partial sums cost R * 4 bytes for 2 * block_c of dy, twice."""
    return R <= 16


def adapter_grad(
    C: int, R: int, itemsize: int, arch: int, *, down: bool = False, products: bool = False
) -> LaunchConfig:
    """One pass over t (M, C). Never a function of M: ``parts`` (``down``) is a sum over the columns of a block."""
    rank = rank_block(R)
    if itemsize == 4:
        return LaunchConfig(32, 64, 0, min(rank, 64), warps=8, stages=2)
    if arch >= 120 and rank > 32:  # no wgmma: the product's operands are held in registers
        return LaunchConfig(64, 64, 0, 32, warps=4, stages=3)
    if arch >= 90:
        if down and not products:
            # wgmma takes 64 rows from four warps: of eight, four would repeat the others' product with b.
            return LaunchConfig(64, 128, 0, rank, warps=4, stages=3)
        columns = 256 // (1 + (rank > 64)) // (1 + products)
        if smem_bytes(arch) < 128 << 10:  # sm_120
            columns = min(columns, 128)
        return LaunchConfig(64, columns, 0, rank, warps=8, stages=3)
    return LaunchConfig(64, 64, 0, min(rank, 32), warps=4, stages=3)


# Columns of W that a program adds up, whatever the tiles.
STRIP = 512


def row_norm(R: int, itemsize: int, arch: int) -> LaunchConfig:
    """Row norms of W + s B A. Bytes decide. Without wgmma the operands of a product sit in registers."""
    return LaunchConfig(64, 64, 0, rank_block(R, 32 if arch >= 90 else 16), warps=4, stages=2)


def block_rotate(size: int, itemsize: int) -> LaunchConfig:
    """Blocks of columns times a matrix each, and the matrices' gradients. Bytes decide; a tile holds a block if it can."""
    return LaunchConfig(64, rank_block(size, 32 if itemsize == 4 else 64), warps=4, stages=2)


def bottleneck(K: int, R: int, itemsize: int, arch: int) -> LaunchConfig:
    """bottleneck_adapter, all of whose kernels take these tiles. Never a function of M. ``rank``: what v's tile holds."""
    if itemsize == 4:
        return LaunchConfig(64, 32, 32, rank_block(R, 32), warps=8, stages=2)
    if arch < 90 or arch >= 120:
        # The terms of A and the product's operands are held in registers.
        return LaunchConfig(64, 64, 32, rank_block(R, 64), warps=8, stages=3)
    rank = rank_block(R, 128)
    return LaunchConfig(64, 64, 64, rank, warps=4 if rank <= 64 else 8, stages=3)


def bottleneck_fused(M: int, config: LaunchConfig) -> bool:
    """Whether one kernel does all of it: where there are tiles of rows enough for the chip."""
    return cdiv(M, config.block_m) >= 96


def row_ranges(M: int, programs: int, block_m: int) -> tuple[int, int]:
    """(row ranges, rows of a range) where a range has this many programs: enough for the chip, each of at least four tiles."""
    wanted = max(1, min(cdiv(TARGET_PROGRAMS, max(programs, 1)), cdiv(M, 4 * block_m)))
    rows = cdiv(cdiv(M, wanted), block_m) * block_m
    return cdiv(M, max(rows, 1)), rows


def grad_ranges(M: int, C: int, R: int, config: LaunchConfig) -> tuple[int, int]:
    """``row_ranges`` of ``adapter_grad``."""
    return row_ranges(M, cdiv(C, config.block_c) * max(1, cdiv(R, config.rank)), config.block_m)


BASES = ("fused", "epilogue", "overlap", "addmm")


def base_product(M: int, N: int, K: int, itemsize: int, arch: int, batch_invariant: bool) -> str:
    """Who computes the base product.

    ``fused``: K1 computes it. ``epilogue``: the vendor's, then one pass of ours; ``overlap``: the same, and u is made
    beside it on a second stream. ``addmm``: the vendor's, with the low-rank term added by a second vendor product (no
    dropped or scaled result, adapters in the dtype of x).
    A vendor's product depends on M, so batch invariance takes ours.
    """
    if batch_invariant:
        return "fused"
    # One extra pass over the result costs more than the few percent by which a Triton product trails the vendor's,
    # once there are tiles enough for every multiprocessor.
    enough = cdiv(M, 128) * cdiv(N, 256) >= TARGET_PROGRAMS // 2
    return "fused" if itemsize == 2 and arch == 90 and enough and K >= 512 else "epilogue"


# Rows up to which each tile of W in codes is decoded where it is multiplied, and not once for all.
DECODED_ROWS = 64


def base_of_codes(M: int, batch_invariant: bool) -> str:
    """``base_product`` of W in codes: of ``epilogue``, the vendor multiplies panels (panels.py)."""
    return "fused" if M <= DECODED_ROWS or batch_invariant else "epilogue"


_NAMES = {
    "base", "gemm", "decoding", "epilogue", "shrink", "shrink_groups", "adapter_grad", "grad_ranges", "row_norm", "block_rotate",
    "bottleneck", "bottleneck_fused",
} | {f"multi_{name}" for name in ("base", "gemm", "expand", "columns", "shrink", "partial", "grad", "ranges")}  # fmt: skip


def fixed(**values: object) -> tuple[tuple[str, object], ...]:
    """Answers for ``Settings.fixed`` that replace those of the functions here, for tuning and tests: ``base="fused"``,
    ``gemm=LaunchConfig(...)``, ``shrink=``... Raises ValueError for an unknown name or base."""
    unknown = set(values) - _NAMES
    if unknown:
        raise ValueError(f"nothing called {', '.join(sorted(unknown))} can be fixed")
    if values.get("base", BASES[0]) not in BASES:
        raise ValueError(f"base is {values['base']!r}, expected one of {', '.join(BASES)}")
    return tuple(sorted(values.items()))


@functools.cache
def reason_against(config: LaunchConfig, itemsize: int, arch: int) -> str | None:
    """``config.invalid``, looked up."""
    return config.invalid(itemsize, arch)

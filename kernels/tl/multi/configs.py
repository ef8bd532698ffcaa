"""Launch configurations of the many-adapter kernels: pure functions of sizes, dtype and architecture.

What a row's bits depend on (tile rows, blocks and spans of a sum, chunks of a rank) is a function of the dtype and of
the length of the sum alone: neither the rows of a batch nor the other adapters' ranks have a say.
"""

from __future__ import annotations

from ..configs import TARGET_PROGRAMS, LaunchConfig, base_product, cdiv, rank_block

# A batch of one row per adapter wastes the rest of a tile, and rows of one adapter share its weights within a tile only.
# All architectures multiply tiles of 32 rows with the same instruction.
TILE_ROWS = 32
SEGMENTS_AT_ONCE = 1024
BASES = ("fused", "own", "vendor")


def search_block(slots: int) -> int:
    """Segments that a program looks at in one step."""
    return min(SEGMENTS_AT_ONCE, max(16, 1 << (slots + 1).bit_length()))


def tile_numbers(M: int, slots: int, rows: int) -> tuple[int, bool]:
    """(how many numbers a tile may have, whether a number is a place): see ``tiles.py``."""
    by_segment = M // rows + slots + 2
    return (M, True) if by_segment >= M else (by_segment, False)


def shrink(R: int, itemsize: int, adapter_itemsize: int, arch: int) -> LaunchConfig:
    """u = x A^T for adapters of rank up to R. How much of the rank a program takes changes no bits."""
    if itemsize == 4:
        return LaunchConfig(TILE_ROWS, 16, 16, min(rank_block(R), 32), warps=4, stages=3)
    # The terms of an fp32 adapter are held in registers.
    rank = min(rank_block(R), 64 if adapter_itemsize == 2 else 32 if arch < 100 else 16)
    warps = 8 if adapter_itemsize == 4 and rank > 16 else 4
    return LaunchConfig(TILE_ROWS, 16, 64, rank, warps=warps, stages=4)


def spans(C: int, block_k: int) -> tuple[int, int]:
    """(spans of a sum over C, blocks of a span): at most 16, none shorter than four blocks."""
    blocks = cdiv(C, block_k)
    each = max(4, cdiv(blocks, 16))
    return cdiv(blocks, each), each


def partial(M: int, R: int, config: LaunchConfig) -> bool:
    """Whether spans are programs of their own: where tiles are too few for the chip."""
    return cdiv(M, config.block_m) * cdiv(R, config.rank) < TARGET_PROGRAMS // 4


def expand(R: int, itemsize: int, arch: int) -> LaunchConfig:
    """A branch onto a base that is there."""
    return LaunchConfig(TILE_ROWS, 64 if itemsize == 4 else 128, 0, min(rank_block(R), 32), warps=4, stages=1)


def gemm(R: int, arch: int, *, drop: bool) -> LaunchConfig:
    """A branch and its base product in one tile; the bits of a dropped branch take registers."""
    rank, columns = min(rank_block(R), 32), 64 if drop or arch >= 100 else 128
    if arch >= 90:
        return LaunchConfig(128, columns, 64, rank, warps=8, stages=3)
    return LaunchConfig(128, columns, 32, 16, warps=8, stages=4 if arch == 80 else 3)


def columns_per_program(M: int, N: int, config: LaunchConfig) -> int:
    """Blocks of columns that a program takes: several where there are rows enough, so that it looks up its tile once."""
    blocks = cdiv(N, config.block_c)
    return max(1, min(blocks, cdiv(M, config.block_m) * blocks // (8 * TARGET_PROGRAMS)))


def grad(R: int, itemsize: int, arch: int) -> LaunchConfig:
    """One pass over t (M, C) for the gradients of all adapters."""
    rank = rank_block(R)
    if itemsize == 4:
        return LaunchConfig(32, 32, 0, 16, warps=4, stages=2)
    if arch >= 90:
        return LaunchConfig(64, 128, 0, min(rank, 64), warps=8, stages=3)
    return LaunchConfig(64, 64, 0, min(rank, 32), warps=4, stages=3)


def base(M: int, N: int, K: int, slots: int, itemsize: int, arch: int, batch_invariant: bool) -> str:
    """Who computes the base product.

    ``vendor``: the vendor's, and the branch is added to it. ``own``: lora_linear's kernel, likewise: a row's bits then do
    not depend on the batch. ``fused``: one kernel for both, which gathers rows by adapter; it saves a pass over y, and
    loses what gathered rows cost a product and the last tile of each adapter.
    """
    if batch_invariant:
        return "own"
    fused = base_product(M, N, K, itemsize, arch, False) == "fused"
    return "fused" if fused and K <= 2048 and M >= 256 * slots else "vendor"

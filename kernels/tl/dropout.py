"""Dropout bits, regenerated wherever they are needed, and the kernel that writes them out.

Philox4x32 with 7 rounds, key = seed, counter = (column >> 3, row), both 64-bit. The eight columns of a group share one
call: column e takes word e >> 1, rotated by 16 bits if e is odd, and is kept iff that word >= floor(p * 2^32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch

_ROWS, _COLUMNS = 16, 512


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    # Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    # One 64-bit product holds both halves: a single wide multiplication on the device.
    for _ in tl.static_range(7):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def keep_tile(seed, row, column0, threshold, COLUMNS: tl.constexpr):
    """int1 (rows, COLUMNS): whether the element is kept.

    ``seed``: int64 value. ``row``: int64 vector. ``column0``: the first column, a multiple of 8. ``threshold``: the
    int32 with the bits of floor(p * 2^32). One Philox call per eight columns, whatever the tile.
    """
    limit = threshold.to(tl.uint32, bitcast=True)
    group = tl.cast(column0 // 8, tl.int64) + tl.arange(0, COLUMNS // 8)
    zero = (row[:, None] * 0 + group[None, :] * 0).to(tl.uint32)
    w0, w1, w2, w3 = _philox(
        group.to(tl.uint32)[None, :] + zero,
        (group >> 32).to(tl.uint32)[None, :] + zero,
        row.to(tl.uint32)[:, None] + zero,
        (row >> 32).to(tl.uint32)[:, None] + zero,
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    # join appends an axis of two: the axes end up as (word >> 1, word & 1, odd), which is the order of the columns.
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    turned = (word << 16) | (word >> 16)
    keep = tl.join(word >= limit, turned >= limit)
    return tl.reshape(keep, (row.shape[0], COLUMNS))


def threshold(p: float) -> int:
    """floor(p * 2^32), computed in double, as the int32 with the same bits."""
    bits = int(p * 2.0**32)
    return bits - 2**32 if bits >= 2**31 else bits


@triton.jit(do_not_specialize=["M", "threshold"])
def dropout_mask_kernel(out, seed, M, K, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column0 = tl.program_id(1).to(tl.int64) * COLUMNS
    column = column0 + tl.arange(0, COLUMNS)
    keep = keep_tile(tl.load(seed), row, column0, threshold, COLUMNS)
    inside = (row[:, None] < M) & (column[None, :] < K)
    tl.store(out + row[:, None] * K + column[None, :], keep.to(tl.int8), mask=inside)


def dropout_mask(seed: torch.Tensor, M: int, K: int, p: float) -> torch.Tensor:
    """bool (M, K) on ``seed.device``, True = kept. ``seed``: one int64 element; 0 <= p < 1."""
    out = torch.empty((M, K), dtype=torch.int8, device=seed.device)
    grid = (triton.cdiv(M, _ROWS), triton.cdiv(K, _COLUMNS))
    args = dict(out=out, seed=seed, M=M, K=K, threshold=threshold(p))
    launch.submit(launch.Launch(dropout_mask_kernel, grid, args, dict(ROWS=_ROWS, COLUMNS=_COLUMNS)))
    return out.view(torch.bool)

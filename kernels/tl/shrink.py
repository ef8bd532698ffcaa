"""u = (drop(x) * p) A^T in fp32: a tall matrix against a few rows.

The sum over K runs in blocks of BLOCK_K columns: each block's product is fresh and the blocks are added in order. The
block depends on (R, dtype) alone. With many rows a program adds all blocks itself; with few rows the blocks are
written by several programs and added, in the same order, by a second kernel: the bits of a row are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import keep_tile
from .tiles import multiple, narrow, split_dot


@triton.jit
def block_product(
    x, a, in_scale, key, rows, row, rank, block, K, R, stride_x, stride_a_rank, stride_a_k, threshold,
    BLOCK_K: tl.constexpr, X_TERMS: tl.constexpr, A_TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(drop(x) * in_scale) a^T over one block of columns. ``key``: the seed's value, None without dropout."""
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    xt = tl.load(x + row[:, None] * stride_x + k[None, :], mask=(k < K)[None, :], other=0.0)
    if key is not None:
        xt = tl.where(keep_tile(key, rows, block * BLOCK_K, threshold, BLOCK_K), xt, 0.0)
    address = a + rank[None, :].to(tl.int64) * stride_a_rank + k[:, None].to(tl.int64) * stride_a_k
    at = tl.load(address, mask=(k < K)[:, None] & (rank < R)[None, :], other=0.0)
    if in_scale is not None:
        scale = tl.load(in_scale + k, mask=k < K, other=0.0).to(tl.float32)
        scaled = at.to(tl.float32) * scale[:, None]
        at = narrow(scaled, at.dtype) if X_TERMS == 0 else scaled
    return split_dot(xt, at, None, X_TERMS, A_TERMS, PRECISION)


@triton.jit(do_not_specialize=["M", "blocks_per_program", "threshold"])
def shrink_kernel(
    u, x, a, in_scale, seed, M, K, R, stride_x, stride_a_rank, stride_a_k,
    blocks_per_program, threshold, factor,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr, PARTIAL: tl.constexpr,
    X_TERMS: tl.constexpr, A_TERMS: tl.constexpr, R_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u = factor * sum. Grid (row tiles, groups of blocks, rank chunks). PARTIAL: ``u`` (blocks, M, R), unscaled."""
    R = multiple(R, R_ALIGN)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(rows, M - 1)
    rank = tl.program_id(2) * RANK + tl.arange(0, RANK)
    first = tl.program_id(1) * blocks_per_program
    last = tl.minimum(first + blocks_per_program, tl.cdiv(K, BLOCK_K))
    inside = (rows < M)[:, None] & (rank < R)[None, :]
    at = row[:, None] * R + rank[None, :]
    total = tl.zeros((BLOCK_M, RANK), tl.float32)
    key = seed
    if seed is not None:
        # Once: within the loop it would be one more narrow copy to keep under way.
        key = tl.load(seed)
    for block in tl.range(first, last):
        product = block_product(
            x, a, in_scale, key, rows, row, rank, block, K, R, stride_x, stride_a_rank, stride_a_k, threshold,
            BLOCK_K, X_TERMS, A_TERMS, PRECISION,
        )  # fmt: skip
        if PARTIAL:
            tl.store(u + tl.cast(block, tl.int64) * M * R + at, product, mask=inside)
        else:
            total += product
    if not PARTIAL:
        tl.store(u + at, total * factor, mask=inside)


@triton.jit(do_not_specialize=["M", "blocks"])
def add_blocks_kernel(
    out, parts, d, u, partial, M, R, blocks, factor,
    BLOCK_M: tl.constexpr, RANK: tl.constexpr, R_ALIGN: tl.constexpr,
):  # fmt: skip
    """out (M, R) = d * factor * (parts[0] + parts[1] + ...), in that order. Grid (row tiles, rank chunks).

    ``partial`` (row tiles, R): column sums of the same without d, times u.
    """
    R = multiple(R, R_ALIGN)
    tile = tl.program_id(0).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.program_id(1) * RANK + tl.arange(0, RANK)
    inside = (row < M)[:, None] & (rank < R)[None, :]
    at = row[:, None] * R + rank[None, :]
    total = tl.zeros((BLOCK_M, RANK), tl.float32)
    for block in tl.range(0, blocks):
        total += tl.load(parts + tl.cast(block, tl.int64) * M * R + at, mask=inside, other=0.0)
    total = total * factor
    if partial is not None:
        sums = tl.sum(total * tl.load(u + at, mask=inside, other=0.0), axis=0)
        tl.store(partial + tile * R + rank, sums, mask=rank < R)
    if d is not None:
        total = total * tl.load(d + rank, mask=rank < R, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, total, mask=inside)

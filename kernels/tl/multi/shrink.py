"""u_t = factor * (drop(x_t) * c_t) A[a_t]^T: each row against the few rows of its own adapter's matrix.

dv_t = s (c_t * dy_t) B[a_t]. The vectors c, p_d and g_d, meet the matrix in fp32, before any rounding.

The sum over C columns runs in blocks of BLOCK_K and spans of so many blocks, both functions of C and the dtype alone:
a block's product is fresh, a span adds its blocks, the row its spans, all in order. With many rows a program adds
everything itself; with few the spans are written by several programs and added by a second kernel. So a row's bits are
the same whatever else is in the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..dropout import keep_tile
from ..tiles import multiple, split_dot
from .tiles import (
    COLUMNS,
    G_D,
    P_D,
    RANK,
    dropout_of,
    find_matrix,
    find_tile,
    find_vector,
    load_vector,
    load_weights,
    pointer_to,
)


@triton.jit
def _sum_blocks(
    x, weight, c, c_there, seed, threshold, row, inside_m, rank, first, last, C, R, stride_x, stride_r, stride_c,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPAN: tl.constexpr, RANK_FAST: tl.constexpr,
    WIDE: tl.constexpr, COL: tl.constexpr, X_TERMS: tl.constexpr, A_TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    span = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if seed is not None:
        key = tl.load(seed)
    for block in tl.range(first, last):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        xt = tl.load(x + row[:, None] * stride_x + k[None, :], mask=inside_m[:, None] & (k < C)[None, :], other=0.0)
        if seed is not None:
            xt = tl.where(keep_tile(key, row, block * BLOCK_K, threshold, BLOCK_K), xt, 0.0)
        wt = load_weights(weight, rank[None, :], k[:, None], R, C, stride_r, stride_c, RANK_FAST, WIDE)
        if COL:
            wt = wt.to(tl.float32) * load_vector(c, c_there, k, C, 1.0)[:, None]
        product = split_dot(xt, wt, None, X_TERMS, A_TERMS, PRECISION)
        fresh = block % SPAN == 0
        total += tl.where(fresh, span, 0.0)
        span = tl.where(fresh, 0.0, span) + product
    return total + span


@triton.jit(do_not_specialize=["M", "slots", "tensors", "count"])
def multi_shrink_kernel(
    u, x, addresses, tensors, vectors, count, table, order, starts, scaling, dropout_p, seed, M, C, MAX_RANK, slots, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPAN: tl.constexpr, PARTIAL: tl.constexpr,
    SIDE_B: tl.constexpr, RANK_FAST: tl.constexpr, BY_ROW: tl.constexpr, SEARCH: tl.constexpr, DTYPE: tl.constexpr,
    COL: tl.constexpr, X_TERMS: tl.constexpr, A_TERMS: tl.constexpr, R_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tile numbers, spans if PARTIAL else 1, rank chunks).

    u (M, MAX_RANK) by row, zero right of a row's rank; PARTIAL: (spans, M, MAX_RANK) by place, unscaled, and written
    only where a rank is. ``scaling``: of the slots, or None. ``dropout_p``: fp64, with ``seed``. COL: whether some adapter
    has a vector c.
    """
    MAX_RANK = multiple(MAX_RANK, R_ALIGN)
    segment, first_place, end = find_tile(starts, tl.program_id(0), M, slots, BLOCK_M, BY_ROW, SEARCH)
    if first_place < end:
        place = first_place + tl.arange(0, BLOCK_M)
        inside_m = place < end
        row = tl.load(order + place, mask=inside_m, other=0).to(tl.int64)
        first_rank = tl.program_id(2) * BLOCK_R
        rank = first_rank + tl.arange(0, BLOCK_R)
        inside = inside_m[:, None] & (rank < MAX_RANK)[None, :]
        blocks = tl.cdiv(C, BLOCK_K)
        if PARTIAL:
            first = tl.program_id(1) * SPAN
            last = tl.minimum(first + SPAN, blocks)
        else:
            first = 0
            last = blocks
        total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        R = tl.cast(0, tl.int32)
        if segment < slots:
            address, R, stride_r, stride_c, wide, _, _ = find_matrix(
                addresses, tensors, table, segment, SIDE_B, RANK_FAST, DTYPE
            )
            factor = tl.cast(1.0, tl.float32)
            threshold = 0
            if seed is not None:
                threshold, factor = dropout_of(dropout_p, segment)
            if scaling is not None:
                factor = tl.load(scaling + segment)
            c = u
            c_there = segment < 0
            if COL:
                c, c_there, _ = find_vector(vectors, count, table, segment, segment >= 0, G_D if SIDE_B else P_D)
            if first_rank < R:
                if wide:
                    total = _sum_blocks(
                        x, pointer_to(address, DTYPE, True), c, c_there, seed, threshold, row, inside_m, rank, first, last, C, R,
                        stride_x, stride_r, stride_c, BLOCK_M, BLOCK_K, BLOCK_R, SPAN, RANK_FAST, True, COL,
                        X_TERMS, A_TERMS, PRECISION,
                    )  # fmt: skip
                else:
                    total = _sum_blocks(
                        x, pointer_to(address, DTYPE, False), c, c_there, seed, threshold, row, inside_m, rank, first, last, C, R,
                        stride_x, stride_r, stride_c, BLOCK_M, BLOCK_K, BLOCK_R, SPAN, RANK_FAST, False, COL,
                        X_TERMS, A_TERMS, PRECISION,
                    )  # fmt: skip
                if not PARTIAL:
                    total = total * factor
        if PARTIAL:
            if first_rank < R:
                at = (tl.cast(tl.program_id(1), tl.int64) * M + place)[:, None] * MAX_RANK + rank[None, :]
                tl.store(u + at, total, mask=inside)
        else:
            tl.store(u + row[:, None] * MAX_RANK + rank[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["M", "slots", "spans"])
def multi_add_spans_kernel(
    u, parts, table, order, starts, scaling, dropout_p, M, MAX_RANK, slots, spans,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BY_ROW: tl.constexpr, SEARCH: tl.constexpr, R_ALIGN: tl.constexpr,
):  # fmt: skip
    """u (M, MAX_RANK) = factor * (parts[0] + parts[1] + ...), in that order. Grid (tile numbers, rank chunks)."""
    MAX_RANK = multiple(MAX_RANK, R_ALIGN)
    segment, first_place, end = find_tile(starts, tl.program_id(0), M, slots, BLOCK_M, BY_ROW, SEARCH)
    if first_place < end:
        place = first_place + tl.arange(0, BLOCK_M)
        inside_m = place < end
        row = tl.load(order + place, mask=inside_m, other=0).to(tl.int64)
        first_rank = tl.program_id(1) * BLOCK_R
        rank = first_rank + tl.arange(0, BLOCK_R)
        inside = inside_m[:, None] & (rank < MAX_RANK)[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        if segment < slots:
            R = tl.load(table + tl.cast(segment, tl.int64) * COLUMNS + RANK).to(tl.int32)
            factor = tl.cast(1.0, tl.float32)
            if dropout_p is not None:
                threshold, factor = dropout_of(dropout_p, segment)
            if scaling is not None:
                factor = tl.load(scaling + segment)
            if first_rank < R:
                at = place[:, None].to(tl.int64) * MAX_RANK + rank[None, :]
                for span in tl.range(0, spans):
                    total += tl.load(parts + tl.cast(span, tl.int64) * M * MAX_RANK + at, mask=inside, other=0.0)
                total = total * factor
        tl.store(u + row[:, None] * MAX_RANK + rank[None, :], total, mask=inside)

"""Gradients of all adapters from one pass over a tall matrix t (dy, or the dropped x), with v = u or du:

    B's:  G[a] (N, R[a]) = s[a] sum_{t: a_t = a} dy_t u_t^T        A's:  G[a] (K, R[a]) = 1/(1-p[a]) sum drop(x_t) du_t^T

times d along the rank (B's) and g_d or p_d along the columns, where an adapter has them.

A program owns BLOCK_C columns, BLOCK_R of the rank, and a range of places in ``order``, and walks the adapters that it
meets there. What an adapter gets from one range only is written where it belongs. A range's first adapter may have
begun before it and its last may end after it: such parts go to ``parts`` and are added, in order, by a second kernel.
Adapters without rows are nobody's: their gradients are zero before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..dropout import keep_tile
from ..tiles import multiple, narrow, split_dot
from .tiles import (
    G_D,
    P_D,
    D,
    dropout_of,
    find_matrix,
    find_segment,
    find_vector,
    load_vector,
    pointer_to,
    store_weights,
)


@triton.jit
def _store(
    address, value, rank, col, R, C, stride_r, stride_c, wide, vectors, count, table, segment, RANK_FAST: tl.constexpr,
    DTYPE: tl.constexpr, SIDE_B: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr,
):  # fmt: skip
    if COL:
        c, there, _ = find_vector(vectors, count, table, segment, segment >= 0, G_D if SIDE_B else P_D)
        value *= load_vector(c, there, col, C, 1.0)[:, None]
    if ROW:
        d, there, _ = find_vector(vectors, count, table, segment, segment >= 0, D)
        value *= load_vector(d, there, rank, R, 1.0)[None, :]
    value = narrow(value, DTYPE)
    if wide:
        weight = pointer_to(address, DTYPE, True)
        store_weights(weight, value, rank[None, :], col[:, None], R, C, stride_r, stride_c, RANK_FAST, True)
    else:
        weight = pointer_to(address, DTYPE, False)
        store_weights(weight, value, rank[None, :], col[:, None], R, C, stride_r, stride_c, RANK_FAST, False)


@triton.jit(do_not_specialize=["M", "slots", "tensors", "count", "places_per_program"])
def multi_adapter_grad_kernel(
    addresses, tensors, vectors, count, parts, t, v, table, order, starts, scaling, dropout_p, seed,
    M, C, MAX_RANK, slots, stride_t, stride_v, places_per_program,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, SIDE_B: tl.constexpr,
    RANK_FAST: tl.constexpr, SEARCH: tl.constexpr, DTYPE: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr,
    T_TERMS: tl.constexpr, V_TERMS: tl.constexpr,
    V_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, ranges, rank chunks).

    addresses: of the gradients, 0 for one that is not wanted. parts (ranges, 2, C, MAX_RANK) fp32, without the factor:
    first what belongs to an adapter that began before the range, then to one that began in it and ends after it.
    """
    MAX_RANK = multiple(MAX_RANK, V_ALIGN)
    stride_v = multiple(stride_v, V_ALIGN)
    col0 = tl.program_id(0) * BLOCK_C
    col = col0 + tl.arange(0, BLOCK_C)
    inside_c = col < C
    part = tl.program_id(1)
    first_rank = tl.program_id(2) * BLOCK_R
    rank = first_rank + tl.arange(0, BLOCK_R)
    local = tl.arange(0, BLOCK_M)
    low = part * places_per_program
    high = tl.minimum(low + places_per_program, M)
    if seed is not None:
        key = tl.load(seed)
    place = low
    while place < high:
        segment, begin, end = find_segment(starts, place, M, slots, BLOCK_M, True, SEARCH)
        stop = tl.minimum(end, high)
        if segment < slots:
            address, R, stride_r, stride_c, wide, base, _ = find_matrix(
                addresses, tensors, table, segment, SIDE_B, RANK_FAST, DTYPE
            )
            if (base != 0) & (first_rank < R):
                factor = tl.cast(1.0, tl.float32)
                if scaling is not None:
                    factor = tl.load(scaling + segment)
                if seed is not None:
                    threshold, factor = dropout_of(dropout_p, segment)
                total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
                for first in tl.range(place, stop, BLOCK_M):
                    inside_m = first + local < stop
                    row = tl.load(order + first + local, mask=inside_m, other=0).to(tl.int64)
                    at_t = row[:, None] * stride_t + col[None, :]
                    tile = tl.load(t + at_t, mask=inside_m[:, None] & inside_c[None, :], other=0.0)
                    if seed is not None:
                        tile = tl.where(keep_tile(key, row, col0, threshold, BLOCK_C), tile, 0.0)
                    at_v = row[:, None] * stride_v + rank[None, :]
                    vt = tl.load(v + at_v, mask=inside_m[:, None] & (rank < MAX_RANK)[None, :], other=0.0)
                    if T_TERMS == 0:
                        vt = narrow(vt, t.dtype.element_ty)
                    total += split_dot(tl.trans(tile), vt, None, T_TERMS, V_TERMS, PRECISION)
                whole = (begin >= low) & (end <= high)
                if whole:
                    _store(
                        address, total * factor, rank, col, R, C, stride_r, stride_c, wide, vectors, count, table, segment,
                        RANK_FAST, DTYPE, SIDE_B, ROW, COL,
                    )  # fmt: skip
                if parts is not None:
                    if not whole:
                        side = tl.where(begin < low, 0, 1)
                        at = (tl.cast(part * 2 + side, tl.int64) * C + col[:, None]) * MAX_RANK + rank[None, :]
                        tl.store(parts + at, total, mask=inside_c[:, None] & (rank < MAX_RANK)[None, :])
        place = stop


@triton.jit(do_not_specialize=["M", "slots", "tensors", "count", "places_per_program"])
def multi_finish_kernel(
    addresses, tensors, vectors, count, parts, table, starts, scaling, dropout_p, M, C, MAX_RANK, slots, places_per_program,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, SIDE_B: tl.constexpr, RANK_FAST: tl.constexpr, SEARCH: tl.constexpr,
    DTYPE: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, V_ALIGN: tl.constexpr,
):  # fmt: skip
    """The sum of the parts of the adapter that begins in range i and ends after it, for each i. Grid (i, C blocks)."""
    MAX_RANK = multiple(MAX_RANK, V_ALIGN)
    part = tl.program_id(0)
    low = part * places_per_program
    border = low + places_per_program
    segment, begin, end = find_segment(starts, border - 1, M, slots, 1, True, SEARCH)
    if (end > border) & (begin >= low) & (segment < slots):
        address, R, stride_r, stride_c, wide, base, _ = find_matrix(
            addresses, tensors, table, segment, SIDE_B, RANK_FAST, DTYPE
        )
        if base != 0:
            factor = tl.cast(1.0, tl.float32)
            if scaling is not None:
                factor = tl.load(scaling + segment)
            if dropout_p is not None:
                threshold, factor = dropout_of(dropout_p, segment)
            col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
            last = tl.cdiv(end, places_per_program)
            for first_rank in tl.range(0, R, BLOCK_R, num_stages=1):
                rank = first_rank + tl.arange(0, BLOCK_R)
                inside = (col < C)[:, None] & (rank < MAX_RANK)[None, :]
                at = col[:, None].to(tl.int64) * MAX_RANK + rank[None, :]
                total = tl.load(parts + (tl.cast(part, tl.int64) * 2 + 1) * C * MAX_RANK + at, mask=inside, other=0.0)
                for other in tl.range(part + 1, last):
                    step = tl.cast(other, tl.int64) * 2 * C * MAX_RANK
                    total += tl.load(parts + step + at, mask=inside, other=0.0)
                _store(
                    address, total * factor, rank, col, R, C, stride_r, stride_c, wide, vectors, count, table, segment,
                    RANK_FAST, DTYPE, SIDE_B, ROW, COL,
                )  # fmt: skip

"""out_t = base_t + drop'(factor * v_t b[a_t]^T) + bias: every row's branch onto a base product.

With v = u, b = lora_B this is the forward; with v = du, b = lora_A^T and dropout on the result it is dx. The base is
read from a matrix that somebody's product has written (``base``, often ``out`` itself), is zero, or is computed here
(``GEMM``) for rows that are gathered by adapter.

The sum over a row's rank runs in chunks of BLOCK_R, which do not depend on the batch; neither do a row's bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..dropout import keep_tile
from ..expand import product
from ..tiles import grouped, multiple, narrow, split_dot
from .tiles import dropout_of, find_matrix, find_tile, load_weights, pointer_to


@triton.jit
def _sum_ranks(
    v, weight, row, inside_m, col, C, R, MAX_RANK, stride_v, stride_r, stride_c, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, RANK_FAST: tl.constexpr, WIDE: tl.constexpr,
    V_TERMS: tl.constexpr, B_TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(0, R, BLOCK_R, num_stages=1):
        rank = first + tl.arange(0, BLOCK_R)
        # The first mask has the alignment of MAX_RANK, which the rank of one adapter need not have.
        at = row[:, None] * stride_v + rank[None, :]
        vt = tl.load(v + at, mask=inside_m[:, None] & (rank < MAX_RANK)[None, :], other=0.0) * factor
        vt = tl.where((rank < R)[None, :], vt, 0.0)
        bt = load_weights(weight, rank[:, None], col[None, :], R, C, stride_r, stride_c, RANK_FAST, WIDE)
        acc = split_dot(vt, bt, acc, V_TERMS, B_TERMS, PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "slots", "tensors", "numbers", "columns_per_program"])
def multi_expand_kernel(
    out, base, x, w, v, addresses, tensors, table, order, starts, scaling, bias, dropout_p, seed,
    M, N, K, MAX_RANK, slots, numbers, columns_per_program, stride_out, stride_base, stride_x, stride_w, stride_v,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    GEMM: tl.constexpr, IN_PLACE: tl.constexpr, W_BY_COLUMN: tl.constexpr, EVEN_K: tl.constexpr,
    SIDE_B: tl.constexpr, RANK_FAST: tl.constexpr, BY_ROW: tl.constexpr, SEARCH: tl.constexpr, DTYPE: tl.constexpr,
    V_TERMS: tl.constexpr, B_TERMS: tl.constexpr, V_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tile numbers * column groups,); a program takes ``columns_per_program`` blocks of columns of its tile.

    v (M, MAX_RANK) fp32. IN_PLACE: ``base`` is ``out``, so that rows without adapter and bias keep their bits. Rows with
    an invalid id, or whose adapter's tensor is not known, are NaN. ``scaling``: of the slots, or None. ``dropout_p`` and
    ``seed``: the branch is dropped.
    """
    MAX_RANK = multiple(MAX_RANK, V_ALIGN)
    stride_v = multiple(stride_v, V_ALIGN)
    blocks = tl.cdiv(N, BLOCK_N)
    number, group = grouped(tl.program_id(0), numbers, tl.cdiv(blocks, columns_per_program), GROUP)
    segment, first_place, end = find_tile(starts, number, M, slots, BLOCK_M, BY_ROW, SEARCH)
    idle = first_place >= end
    if IN_PLACE:
        if bias is None:
            idle = idle | (segment == slots)
    if not idle:
        place = first_place + tl.arange(0, BLOCK_M)
        inside_m = place < end
        row = tl.load(order + place, mask=inside_m, other=0).to(tl.int64)
        address = tl.cast(0, tl.int64)
        R = tl.cast(0, tl.int32)
        stride_r = tl.cast(0, tl.int64)
        stride_c = tl.cast(0, tl.int64)
        wide = segment < 0
        factor = tl.cast(1.0, tl.float32)
        threshold = tl.cast(0, tl.int32)
        known = segment == slots
        if segment < slots:
            address, R, stride_r, stride_c, wide, _, known = find_matrix(
                addresses, tensors, table, segment, SIDE_B, RANK_FAST, DTYPE
            )
            if scaling is not None:
                factor = tl.load(scaling + segment)
            if seed is not None:
                threshold, factor = dropout_of(dropout_p, segment)
        if seed is not None:
            key = tl.load(seed)
        first_block = group * columns_per_program
        for block in tl.range(first_block, tl.minimum(first_block + columns_per_program, blocks), num_stages=1):
            col0 = block * BLOCK_N
            col = col0 + tl.arange(0, BLOCK_N)
            inside = inside_m[:, None] & (col < N)[None, :]
            if wide:
                acc = _sum_ranks(
                    v, pointer_to(address, DTYPE, True), row, inside_m, col, N, R, MAX_RANK, stride_v, stride_r,
                    stride_c, factor, BLOCK_M, BLOCK_N, BLOCK_R, RANK_FAST, True, V_TERMS, B_TERMS, PRECISION,
                )  # fmt: skip
            else:
                acc = _sum_ranks(
                    v, pointer_to(address, DTYPE, False), row, inside_m, col, N, R, MAX_RANK, stride_v, stride_r,
                    stride_c, factor, BLOCK_M, BLOCK_N, BLOCK_R, RANK_FAST, False, V_TERMS, B_TERMS, PRECISION,
                )  # fmt: skip
            if seed is not None:
                acc = tl.where(keep_tile(key, row, col0, threshold, BLOCK_N), acc, 0.0)
            if GEMM:
                acc = product(
                    acc, x, w, None, 0, col0, row, col, M, N, K, stride_x, stride_w,
                    BLOCK_K, W_BY_COLUMN, False, EVEN_K, out.dtype.element_ty != tl.float32, PRECISION,
                )  # fmt: skip
            elif base is not None:
                acc += tl.load(base + row[:, None] * stride_base + col[None, :], mask=inside, other=0.0).to(tl.float32)
            if bias is not None:
                acc += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
            acc = tl.where(known, acc, float("nan"))
            tl.store(out + row[:, None] * stride_out + col[None, :], narrow(acc, out.dtype.element_ty), mask=inside)

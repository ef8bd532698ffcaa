"""out_t = z_t * base_t + c_t * drop'(factor * (v_t * d_t) b[a_t]^T) + bias_t: every row's branch onto a base product.

With v = u, b = lora_B this is the forward; with v = du, b = lora_A^T and dropout on the result it is dx. The vectors z
and c, g_b and g_d in the forward, p_b and p_d in dx, d and the bias are those of the row's adapter. The base is
read from a matrix that somebody's product has written (``base``, often ``out`` itself), is zero, or is computed here
(``GEMM``) for rows that are gathered by adapter.

The sum over a row's rank runs in chunks of BLOCK_R, which do not depend on the batch; neither do a row's bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..dropout import keep_tile
from ..expand import product
from ..tiles import grouped, multiple, narrow
from .ranks import sum_ranks
from .tiles import BETA, G_B, G_D, P_B, P_D, D, dropout_of, find_matrix, find_tile, find_vector, load_vector, pointer_to


@triton.jit(do_not_specialize=["M", "slots", "tensors", "count", "numbers", "columns_per_program"])
def multi_expand_kernel(
    out, base, x, w, v, addresses, tensors, vectors, count, table, order, starts, scaling, bias, dropout_p, seed,
    M, N, K, MAX_RANK, slots, numbers, columns_per_program, stride_out, stride_base, stride_x, stride_w, stride_v,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    GEMM: tl.constexpr, IN_PLACE: tl.constexpr, W_BY_COLUMN: tl.constexpr, EVEN_K: tl.constexpr,
    SIDE_B: tl.constexpr, RANK_FAST: tl.constexpr, BY_ROW: tl.constexpr, SEARCH: tl.constexpr, DTYPE: tl.constexpr,
    ROW: tl.constexpr, COL: tl.constexpr, BASE: tl.constexpr, OWN_BIAS: tl.constexpr,
    V_TERMS: tl.constexpr, B_TERMS: tl.constexpr, V_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tile numbers * column groups,); a program takes ``columns_per_program`` blocks of columns of its tile.

    v (M, MAX_RANK) fp32. IN_PLACE: ``base`` is ``out``, so that rows without adapter and bias keep their bits. Rows with
    an invalid id, or whose adapter's tensor is not known, are NaN. ``scaling``: of the slots, or None. ``dropout_p`` and
    ``seed``: the branch is dropped. ROW, COL, BASE, OWN_BIAS: whether some adapter has a vector d, one of the branch's
    columns, one of the base's, a bias.
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
        d = v
        d_there = segment < 0
        if ROW:
            d, d_there, readable = find_vector(vectors, count, table, segment, segment < slots, D)
            known = known & readable
        if COL:
            c, c_there, readable = find_vector(
                vectors, count, table, segment, segment < slots, G_D if SIDE_B else P_D
            )  # fmt: skip
            known = known & readable
        if BASE:
            z, z_there, readable = find_vector(
                vectors, count, table, segment, segment < slots, G_B if SIDE_B else P_B
            )  # fmt: skip
            known = known & readable
        if OWN_BIAS:
            beta, beta_there, readable = find_vector(vectors, count, table, segment, segment < slots, BETA)
            known = known & readable
        if seed is not None:
            key = tl.load(seed)
        first_block = group * columns_per_program
        for block in tl.range(first_block, tl.minimum(first_block + columns_per_program, blocks), num_stages=1):
            col0 = block * BLOCK_N
            col = col0 + tl.arange(0, BLOCK_N)
            inside = inside_m[:, None] & (col < N)[None, :]
            if wide:
                acc = sum_ranks(
                    v, pointer_to(address, DTYPE, True), d, d_there, row, inside_m, col, N, R, MAX_RANK, stride_v, stride_r,
                    stride_c, factor, BLOCK_M, BLOCK_N, BLOCK_R, RANK_FAST, True, ROW, V_TERMS, B_TERMS, PRECISION,
                )  # fmt: skip
            else:
                acc = sum_ranks(
                    v, pointer_to(address, DTYPE, False), d, d_there, row, inside_m, col, N, R, MAX_RANK, stride_v, stride_r,
                    stride_c, factor, BLOCK_M, BLOCK_N, BLOCK_R, RANK_FAST, False, ROW, V_TERMS, B_TERMS, PRECISION,
                )  # fmt: skip
            if seed is not None:
                acc = tl.where(keep_tile(key, row, col0, threshold, BLOCK_N), acc, 0.0)
            if COL:
                acc *= load_vector(c, c_there, col, N, 1.0)[None, :]
            if GEMM:
                acc = product(
                    acc, x, w, None, 0, col0, row, col, M, N, K, stride_x, stride_w,
                    BLOCK_K, W_BY_COLUMN, False, EVEN_K, out.dtype.element_ty != tl.float32, PRECISION,
                )  # fmt: skip
            elif base is not None:
                under = tl.load(base + row[:, None] * stride_base + col[None, :], mask=inside, other=0.0).to(tl.float32)
                if BASE:
                    under *= load_vector(z, z_there, col, N, 1.0)[None, :]
                acc += under
            if OWN_BIAS:
                added = load_vector(beta, beta_there, col, N, 0.0)
                if bias is not None:
                    added += tl.load(bias + col, mask=col < tl.where(beta_there, 0, N), other=0.0).to(tl.float32)
                acc += added[None, :]
            elif bias is not None:
                acc += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
            acc = tl.where(known, acc, float("nan"))
            tl.store(out + row[:, None] * stride_out + col[None, :], narrow(acc, out.dtype.element_ty), mask=inside)

"""K1: a base product and a low-rank term in one tile, with all scales.

    out = g * base + drop'( (v' * scaling * d) (c * b)^T ) + bias            base = (x * q) w^T

With v = u, b = lora_B this is the forward; with v = du, b = lora_A^T and dropout on the result it is dx. The base is
computed here (``GEMM``), or read from a matrix that a vendor's product has written.

The low-rank term comes first where it can: the base product then accumulates on top of it, and even a dropped term
needs no second accumulator. Where the base is wanted by itself (g, a saved base, its column product) it comes first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import keep_tile
from .operand import first_tile, load_tile, next_tile
from .tiles import dot, grouped, multiple, narrow, split_dot


@triton.jit
def column_tile(b, column_scale, rank, col, N, R, stride_b_col, stride_b_rank, NATIVE: tl.constexpr):
    """b^T * column_scale at (rank, col), scaled in fp32; rounded to b's dtype if NATIVE."""
    address = b + rank[:, None].to(tl.int64) * stride_b_rank + col[None, :].to(tl.int64) * stride_b_col
    bt = tl.load(address, mask=(rank < R)[:, None] & (col < N)[None, :], other=0.0)
    if column_scale is not None:
        scale = tl.load(column_scale + col, mask=col < N, other=0.0).to(tl.float32)
        scaled = bt.to(tl.float32) * scale[None, :]
        bt = narrow(scaled, bt.dtype) if NATIVE else scaled
    return bt


@triton.jit
def _low_rank_chunk(
    acc, v, b, d, column_scale, row, col, first, N, R, stride_v, stride_b_col, stride_b_rank, scaling,
    RANK: tl.constexpr, V_TERMS: tl.constexpr, B_TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Scales that are constant along a sum are folded into the small operands, in fp32 and before any rounding.
    rank = first + tl.arange(0, RANK)
    inside = rank < R
    vt = tl.load(v + row[:, None] * stride_v + rank[None, :], mask=inside[None, :], other=0.0) * scaling
    if d is not None:
        vt = vt * tl.load(d + rank, mask=inside, other=0.0).to(tl.float32)[None, :]
    bt = column_tile(b, column_scale, rank, col, N, R, stride_b_col, stride_b_rank, V_TERMS == 0)
    if V_TERMS == 0:
        vt = narrow(vt, bt.dtype)
    return split_dot(vt, bt, acc, V_TERMS, B_TERMS, PRECISION)


@triton.jit
def low_rank(
    acc, v, b, d, column_scale, row, col, N, R, stride_v, stride_b_col, stride_b_rank, scaling,
    RANK: tl.constexpr, CHUNKS: tl.constexpr, V_TERMS: tl.constexpr, B_TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if CHUNKS == 1:
        acc = _low_rank_chunk(
            acc, v, b, d, column_scale, row, col, 0, N, R, stride_v, stride_b_col, stride_b_rank, scaling,
            RANK, V_TERMS, B_TERMS, PRECISION,
        )  # fmt: skip
    else:
        for first in tl.range(0, R, RANK, num_stages=1):
            acc = _low_rank_chunk(
                acc, v, b, d, column_scale, row, col, first, N, R, stride_v, stride_b_col, stride_b_rank, scaling,
                RANK, V_TERMS, B_TERMS, PRECISION,
            )  # fmt: skip
    return acc


@triton.jit
def product(
    acc, x, w, in_scale, row0, col0, row, col, M, N, K, stride_x, stride_w,
    BLOCK_K: tl.constexpr, W_BY_COLUMN: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
    RUNNING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (x * in_scale) w^T. W_BY_COLUMN: a row of w in memory is one output column, otherwise one k."""
    depth = tl.arange(0, BLOCK_K)
    if not TMA:
        x_at = x + row[:, None] * stride_x + depth[None, :]
    if not hasattr(w, "codes"):
        w_at = first_tile(w, col, depth, N, stride_w, W_BY_COLUMN, TMA)
    for k in tl.range(0, K, BLOCK_K):
        if TMA:
            xt = x.load([row0, k])
        elif EVEN_K:
            xt = tl.load(x_at)
        else:
            xt = tl.load(x_at, mask=(k + depth < K)[None, :], other=0.0)
        if hasattr(w, "codes"):
            # As it was given: what a function returns are no constants any more.
            wt = narrow(load_tile(w, k, col0, col, depth, N, K, W_BY_COLUMN, TMA, EVEN_K), xt.dtype)
        else:
            wt = load_tile(w_at, k, col0, col, depth, N, K, W_BY_COLUMN, TMA, EVEN_K)
            if not TMA:
                w_at = next_tile(w_at, stride_w, BLOCK_K, W_BY_COLUMN)
        if not TMA:
            x_at += BLOCK_K
        if in_scale is not None:
            scale = tl.load(in_scale + k + depth, mask=k + depth < K, other=0.0).to(tl.float32)
            xt = narrow(xt.to(tl.float32) * scale[None, :], xt.dtype)
        if RUNNING:
            acc = dot(xt, wt, acc, PRECISION)
        else:
            acc += dot(xt, wt, None, PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "threshold"])
def expand_kernel(
    out, base, x, w, v, b, bias, in_scale, out_scale, d, column_scale, factor, partial, seed,
    M, N, K, R, stride_out, stride_base, stride_x, stride_w, stride_v, stride_b_col, stride_b_rank, stride_factor,
    scaling, threshold, inverse_keep,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr, CHUNKS: tl.constexpr,
    V_TERMS: tl.constexpr, B_TERMS: tl.constexpr, GROUP: tl.constexpr, GEMM: tl.constexpr, BASE_FIRST: tl.constexpr,
    SAVE_BASE: tl.constexpr, W_BY_COLUMN: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
    FLATTEN: tl.constexpr, R_ALIGN: tl.constexpr, B_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_N) tile of ``out`` per step; programs walk tiles ``program_id, + num_programs, ...``.

    CHUNKS: chunks of RANK that the rank needs, 0 without a low-rank term. ``base``: read if not GEMM, written if
    SAVE_BASE. BASE_FIRST: the base product is wanted by itself, or read. ``partial`` (row tiles, N): column sums
    of base * factor, one row per tile. x and w are tensor
    descriptors with TMA, else pointers to rows of unit stride; w may be ``codes.Codes``. inverse_keep and threshold act if
    ``seed`` is given.
    """
    R = multiple(R, R_ALIGN)
    stride_v = multiple(stride_v, R_ALIGN)
    stride_b_col = multiple(stride_b_col, B_ALIGN)
    LOW_RANK_FIRST: tl.constexpr = (CHUNKS > 0) and (not BASE_FIRST)
    LOW_RANK_LAST: tl.constexpr = (CHUNKS > 0) and BASE_FIRST
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    if seed is not None:
        key = tl.load(seed)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = grouped(tile, tiles_m, tiles_n, GROUP)
        row0 = tile_m * BLOCK_M
        col0 = tile_n * BLOCK_N
        rows = tl.cast(row0, tl.int64) + tl.arange(0, BLOCK_M)
        row = tl.minimum(rows, M - 1)
        col = col0 + tl.arange(0, BLOCK_N)
        inside = (rows < M)[:, None] & (col < N)[None, :]

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if LOW_RANK_FIRST:
            acc = low_rank(
                acc, v, b, d, column_scale, row, col, N, R, stride_v, stride_b_col, stride_b_rank, scaling,
                RANK, CHUNKS, V_TERMS, B_TERMS, PRECISION,
            )  # fmt: skip
            if seed is not None:
                acc = tl.where(keep_tile(key, rows, col0, threshold, BLOCK_N), acc * inverse_keep, 0.0)

        if GEMM:
            acc = product(
                acc, x, w, in_scale, row0, col0, row, col, M, N, K, stride_x, stride_w,
                BLOCK_K, W_BY_COLUMN, TMA, EVEN_K, out.dtype.element_ty != tl.float32, PRECISION,
            )  # fmt: skip
        else:
            acc = tl.load(base + row[:, None] * stride_base + col[None, :], mask=inside, other=0.0).to(tl.float32)
        if SAVE_BASE:
            tl.store(base + row[:, None] * stride_base + col[None, :], narrow(acc, base.dtype.element_ty), mask=inside)
        if partial is not None:
            other = tl.load(factor + row[:, None] * stride_factor + col[None, :], mask=inside, other=0.0)
            sums = tl.sum(tl.where(inside, acc * other.to(tl.float32), 0.0), axis=0)
            tl.store(partial + tl.cast(tile_m, tl.int64) * N + col, sums, mask=col < N)
        if out_scale is not None:
            acc = acc * tl.load(out_scale + col, mask=col < N, other=0.0).to(tl.float32)[None, :]

        if LOW_RANK_LAST:
            if seed is None:
                acc = low_rank(
                    acc, v, b, d, column_scale, row, col, N, R, stride_v, stride_b_col, stride_b_rank, scaling,
                    RANK, CHUNKS, V_TERMS, B_TERMS, PRECISION,
                )  # fmt: skip
            else:
                delta = low_rank(
                    tl.zeros((BLOCK_M, BLOCK_N), tl.float32), v, b, d, column_scale, row, col, N, R,
                    stride_v, stride_b_col, stride_b_rank, scaling, RANK, CHUNKS, V_TERMS, B_TERMS, PRECISION,
                )  # fmt: skip
                acc += tl.where(keep_tile(key, rows, col0, threshold, BLOCK_N), delta * inverse_keep, 0.0)
        if bias is not None:
            acc += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
        tl.store(out + row[:, None] * stride_out + col[None, :], narrow(acc, out.dtype.element_ty), mask=inside)

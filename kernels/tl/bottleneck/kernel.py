"""bottleneck_adapter's kernels: a sum over the columns of x, an activation, and a product that is added to a residual.

    forward    t = factor * drop(x) A^T + rank_bias          v = scaling * gate * f(t)
    backward   dv = factor * drop(x) (A * scale)^T           v = gate * dv * f'(t)          x = dy
    both       out = residual + drop(v (b * scale)^T + scaling * gate * scale * column_bias)

``bottleneck_kernel`` does all of it for a tile of rows: v stays in registers, and out's columns are walked from the last to
the first, for it was the last of x that was read last. With few rows, or a rank that does not fit, ``shrink_kernel`` makes
the sum's blocks, ``bottleneck_rank_kernel`` v, and ``bottleneck_out_kernel`` out, each in as many programs as there are
tiles; the order of every sum, and so each row's bits, is the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..dropout import keep_tile
from ..expand import column_tile, low_rank
from ..shrink import block_product
from ..tiles import grouped, multiple, narrow, split_dot
from .activation import activate, slope


@triton.jit
def _rank_tile(
    total, rank_bias, t, v, z, gate, dots, sums, tile, rows, row, rank, M, R, factor, scaling, ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """v of a sum. t is written, or read if BACKWARD, which also writes v, z = gate * f(t), ``dots`` (M) = rowdot(dv, f(t))
    and ``sums`` (row tiles, R) = column sums of v, each if there is one."""
    inside = (rows < M)[:, None] & (rank < R)[None, :]
    at = row[:, None] * R + rank[None, :]
    total = total * factor
    if gate is not None:
        weight = tl.load(gate + row).to(tl.float32)[:, None]
    if BACKWARD:
        pre = tl.load(t + at, mask=inside, other=0.0)
        if dots is not None or z is not None:
            value = activate(pre, ACTIVATION)
            if dots is not None:
                tl.store(dots + rows, tl.sum(tl.where(inside, total * value, 0.0), axis=1), mask=rows < M)
            if z is not None:
                if gate is not None:
                    value = value * weight
                tl.store(z + at, value, mask=inside)
        value = total * slope(pre, ACTIVATION)
    else:
        if rank_bias is not None:
            total += tl.load(rank_bias + rank, mask=rank < R, other=0.0).to(tl.float32)[None, :]
        tl.store(t + at, total, mask=inside)
        value = activate(total, ACTIVATION) * scaling
    if gate is not None:
        value = value * weight
    if sums is not None:
        tl.store(sums + tile * R + rank, tl.sum(tl.where(inside, value, 0.0), axis=0), mask=rank < R)
    if v is not None:
        tl.store(v + at, value, mask=inside)
    # Past the rank f is not always zero.
    return tl.where((rank < R)[None, :], value, 0.0)


@triton.jit
def _store_tile(
    acc, out, column_scale, column_bias, gate, residual, key, rows, row, col0, M, N, stride_residual, scaling, threshold,
    inverse_keep, BLOCK_N: tl.constexpr,
):  # fmt: skip
    col = col0 + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (col < N)[None, :]
    if column_bias is not None:
        bias = tl.load(column_bias + col, mask=col < N, other=0.0).to(tl.float32) * scaling
        if column_scale is not None:
            bias = bias * tl.load(column_scale + col, mask=col < N, other=0.0).to(tl.float32)
        if gate is not None:
            acc += bias[None, :] * tl.load(gate + row).to(tl.float32)[:, None]
        else:
            acc += bias[None, :]
    if key is not None:
        acc = tl.where(keep_tile(key, rows, col0, threshold, BLOCK_N), acc * inverse_keep, 0.0)
    if residual is not None:
        at = residual + row[:, None] * stride_residual + col[None, :]
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * N + col[None, :], narrow(acc, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "threshold"])
def bottleneck_kernel(
    out, x, a, in_scale, rank_bias, t, v, z, gate, dots, sums, b, column_scale, column_bias, residual, seed_in, seed_out,
    M, K, N, R, stride_x, stride_a_rank, stride_a_k, stride_b_col, stride_b_rank, stride_residual,
    factor, scaling, threshold, inverse_keep,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr,
    ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, X_TERMS: tl.constexpr, A_TERMS: tl.constexpr,
    V_TERMS: tl.constexpr, B_TERMS: tl.constexpr, R_ALIGN: tl.constexpr, B_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles,); RANK holds R. ``out`` (M, N) contiguous, or None."""
    R = multiple(R, R_ALIGN)
    stride_b_col = multiple(stride_b_col, B_ALIGN)
    tile = tl.program_id(0).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(rows, M - 1)
    rank = tl.arange(0, RANK)
    key = seed_in
    if seed_in is not None:
        key = tl.load(seed_in)
    total = tl.zeros((BLOCK_M, RANK), tl.float32)
    for block in tl.range(0, tl.cdiv(K, BLOCK_K)):
        total += block_product(
            x, a, in_scale, key, rows, row, rank, block, K, R, stride_x, stride_a_rank, stride_a_k, threshold,
            BLOCK_K, X_TERMS, A_TERMS, PRECISION,
        )  # fmt: skip
    value = _rank_tile(
        total, rank_bias, t, v, z, gate, dots, sums, tile, rows, row, rank, M, R, factor, scaling, ACTIVATION, BACKWARD
    )
    if out is not None:
        key_out = seed_out
        if seed_out is not None:
            key_out = tl.load(seed_out)
        if V_TERMS == 0:
            value = narrow(value, b.dtype.element_ty)
        columns = tl.cdiv(N, BLOCK_N)
        for step in tl.range(0, columns):
            col0 = (columns - 1 - step) * BLOCK_N
            col = col0 + tl.arange(0, BLOCK_N)
            bt = column_tile(b, column_scale, rank, col, N, R, stride_b_col, stride_b_rank, V_TERMS == 0)
            acc = split_dot(value, bt, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), V_TERMS, B_TERMS, PRECISION)
            _store_tile(
                acc, out, column_scale, column_bias, gate, residual, key_out, rows, row, col0, M, N, stride_residual,
                scaling, threshold, inverse_keep, BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M", "blocks"])
def bottleneck_rank_kernel(
    parts, rank_bias, t, v, z, gate, dots, sums, M, R, blocks, factor, scaling,
    BLOCK_M: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, R_ALIGN: tl.constexpr,
):  # fmt: skip
    """The sum is that of parts (blocks, M, R), in order. Grid (row tiles, rank chunks); ``dots`` (rank chunks, M)."""
    R = multiple(R, R_ALIGN)
    tile = tl.program_id(0).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(rows, M - 1)
    chunk = tl.program_id(1)
    rank = chunk * RANK + tl.arange(0, RANK)
    inside = (rows < M)[:, None] & (rank < R)[None, :]
    at = row[:, None] * R + rank[None, :]
    total = tl.zeros((BLOCK_M, RANK), tl.float32)
    for block in tl.range(0, blocks):
        total += tl.load(parts + tl.cast(block, tl.int64) * M * R + at, mask=inside, other=0.0)
    if dots is not None:
        dots += tl.cast(chunk, tl.int64) * M
    _rank_tile(
        total, rank_bias, t, v, z, gate, dots, sums, tile, rows, row, rank, M, R, factor, scaling, ACTIVATION, BACKWARD
    )


@triton.jit(do_not_specialize=["M", "threshold"])
def bottleneck_out_kernel(
    out, v, b, column_scale, column_bias, gate, residual, seed_out,
    M, N, R, stride_v, stride_b_col, stride_b_rank, stride_residual, scaling, threshold, inverse_keep,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, CHUNKS: tl.constexpr, V_TERMS: tl.constexpr,
    B_TERMS: tl.constexpr, GROUP: tl.constexpr, R_ALIGN: tl.constexpr, B_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_N) tile of ``out`` (M, N), contiguous. Grid (tiles,). CHUNKS of RANK hold R."""
    R = multiple(R, R_ALIGN)
    stride_v = multiple(stride_v, R_ALIGN)
    stride_b_col = multiple(stride_b_col, B_ALIGN)
    tile_m, tile_n = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    rows = tl.cast(tile_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(rows, M - 1)
    col0 = tile_n * BLOCK_N
    col = col0 + tl.arange(0, BLOCK_N)
    acc = low_rank(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), v, b, None, column_scale, row, col, N, R, stride_v, stride_b_col,
        stride_b_rank, 1.0, RANK, CHUNKS, V_TERMS, B_TERMS, PRECISION,
    )  # fmt: skip
    key = seed_out
    if seed_out is not None:
        key = tl.load(seed_out)
    _store_tile(
        acc, out, column_scale, column_bias, gate, residual, key, rows, row, col0, M, N, stride_residual, scaling,
        threshold, inverse_keep, BLOCK_N,
    )  # fmt: skip

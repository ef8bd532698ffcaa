"""What the adapters' gradients need from one pass over a tall matrix t (dy or the dropped x).

    G = t^T (c * v)      and, in the same pass,      parts = t (q * b)      sum_t t      sum_t t * h

A program owns BLOCK_C columns and a range of rows, and walks the range in tiles of BLOCK_M. Row ranges are fixed
functions of the sizes; their results are written side by side and added in order by ``finish_kernel``: no atomics.
``parts`` is fresh for each block of columns, so the bits of a row do not depend on the other rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import keep_tile
from .tiles import dot, multiple, narrow, split_dot


@triton.jit(do_not_specialize=["M", "rows_per_program", "threshold"])
def adapter_grad_kernel(
    grad, parts, sums, products, t, v, b, h, v_scale, b_scale, weights, seed,
    M, C, R, stride_t, stride_v, stride_h, stride_b_col, stride_b_rank, rows_per_program, threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, RANK: tl.constexpr, T_TERMS: tl.constexpr,
    B_T_TERMS: tl.constexpr, V_TERMS: tl.constexpr, B_TERMS: tl.constexpr, R_ALIGN: tl.constexpr,
    B_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, row ranges, rank chunks). Each output may be None. ``weights`` (M): of the rows in ``sums``.

    grad (ranges, C, R), parts (column blocks, M, R), sums and products (ranges, C), all fp32. Native products
    (terms 0) take v and b in the dtype of t.
    """
    R = multiple(R, R_ALIGN)
    stride_v = multiple(stride_v, R_ALIGN)
    stride_b_col = multiple(stride_b_col, B_ALIGN)
    block = tl.program_id(0)
    col = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = col < C
    part = tl.program_id(1)
    rank = tl.program_id(2) * RANK + tl.arange(0, RANK)
    inside_r = rank < R
    start = part * rows_per_program
    stop = tl.minimum(start + rows_per_program, M)
    if parts is not None:
        address = b + col[:, None].to(tl.int64) * stride_b_col + rank[None, :].to(tl.int64) * stride_b_rank
        bt = tl.load(address, mask=inside_c[:, None] & inside_r[None, :], other=0.0)
        if b_scale is not None:
            scaled = bt.to(tl.float32) * tl.load(b_scale + col, mask=inside_c, other=0.0).to(tl.float32)[:, None]
            bt = narrow(scaled, t.dtype.element_ty) if B_T_TERMS == 0 else scaled
    if grad is not None and v_scale is not None:
        scale = tl.load(v_scale + rank, mask=inside_r, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_C, RANK), tl.float32)
    column_sum = tl.zeros((BLOCK_C,), tl.float32)
    column_product = tl.zeros((BLOCK_C,), tl.float32)
    # By way of fp32: the interpreters of Triton before 3.9 know no constant of bf16.
    ones = tl.full((BLOCK_M, 16), 1.0, tl.float32).to(t.dtype.element_ty)
    # 64-bit addresses for the corner of a tile only: offsets within a tile are small and the same in every step.
    local = tl.arange(0, BLOCK_M)
    at_tile = local[:, None] * stride_t + col[None, :]
    at_v = local[:, None] * stride_v + rank[None, :]
    if seed is not None:
        key = tl.load(seed)
    for first in tl.range(start, stop, BLOCK_M):
        corner = tl.cast(first, tl.int64)
        inside_m = (first + local < stop)[:, None]
        inside = inside_m & inside_c[None, :]
        tile = tl.load(t + corner * stride_t + at_tile, mask=inside, other=0.0)
        if seed is not None:
            tile = tl.where(keep_tile(key, corner + local, block * BLOCK_C, threshold, BLOCK_C), tile, 0.0)
        if parts is not None:
            product = split_dot(tile, bt, None, B_T_TERMS, B_TERMS, PRECISION)
            at = local[:, None] * R + rank[None, :]
            tl.store(
                parts + (tl.cast(block, tl.int64) * M + corner) * R + at, product, mask=inside_m & inside_r[None, :]
            )
        if grad is not None:
            vt = tl.load(v + corner * stride_v + at_v, mask=inside_m & inside_r[None, :], other=0.0)
            if v_scale is not None:
                vt = vt * scale[None, :]
            if T_TERMS == 0:
                vt = narrow(vt, t.dtype.element_ty)
            total += split_dot(tl.trans(tile), vt, None, T_TERMS, V_TERMS, PRECISION)
        if sums is not None:
            if weights is not None:
                weight = tl.load(weights + corner + local, mask=first + local < stop, other=0.0).to(tl.float32)
            if t.dtype.element_ty == tl.float32:
                column_sum += tl.sum(tile if weights is None else tile * weight[:, None], axis=0)
            else:
                # The matrix unit adds a column faster than threads exchange it; sixteen equal copies come back.
                if weights is None:
                    copies = dot(tl.trans(tile), ones, None, PRECISION)
                else:
                    equal = tl.broadcast_to(weight[:, None], (BLOCK_M, 16))
                    copies = split_dot(tl.trans(tile), equal, None, T_TERMS, V_TERMS, PRECISION)
                column_sum += tl.max(copies, axis=1)
        if products is not None:
            at = local[:, None] * stride_h + col[None, :]
            ht = tl.load(h + corner * stride_h + at, mask=inside, other=0.0)
            column_product += tl.sum(tile.to(tl.float32) * ht.to(tl.float32), axis=0)
    if grad is not None:
        at = (tl.cast(part, tl.int64) * C + col[:, None]) * R + rank[None, :]
        tl.store(grad + at, total, mask=inside_c[:, None] & inside_r[None, :])
    # The columns' sums are the same in every rank chunk; the first one writes them.
    once = col < tl.where(tl.program_id(2) == 0, C, 0)
    if sums is not None:
        tl.store(sums + tl.cast(part, tl.int64) * C + col, column_sum, mask=once)
    if products is not None:
        tl.store(products + tl.cast(part, tl.int64) * C + col, column_product, mask=once)


@triton.jit(do_not_specialize=["ranges"])
def finish_kernel(
    out, dots, grad, other, scale, C, R, stride_out_col, stride_out_rank, stride_other_col, stride_other_rank,
    ranges, factor, BLOCK_C: tl.constexpr, RANK: tl.constexpr, R_ALIGN: tl.constexpr, COL_ALIGN: tl.constexpr,
):  # fmt: skip
    """S = factor * (grad[0] + grad[1] + ...); out = scale[:, None] * S and dots = rowdot(other, S). Grid (C blocks,)."""
    R = multiple(R, R_ALIGN)
    stride_out_col = multiple(stride_out_col, COL_ALIGN)
    stride_other_col = multiple(stride_other_col, COL_ALIGN)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = col < C
    row_dot = tl.zeros((BLOCK_C,), tl.float32)
    for first in tl.range(0, R, RANK, num_stages=1):
        rank = first + tl.arange(0, RANK)
        inside = inside_c[:, None] & (rank < R)[None, :]
        total = tl.zeros((BLOCK_C, RANK), tl.float32)
        for part in tl.range(0, ranges):
            at = (tl.cast(part, tl.int64) * C + col[:, None]) * R + rank[None, :]
            total += tl.load(grad + at, mask=inside, other=0.0)
        total = total * factor
        if dots is not None:
            address = other + col[:, None].to(tl.int64) * stride_other_col + rank[None, :] * stride_other_rank
            row_dot += tl.sum(total * tl.load(address, mask=inside, other=0.0).to(tl.float32), axis=1)
        if out is not None:
            if scale is not None:
                total = total * tl.load(scale + col, mask=inside_c, other=0.0).to(tl.float32)[:, None]
            address = out + col[:, None].to(tl.int64) * stride_out_col + rank[None, :].to(tl.int64) * stride_out_rank
            tl.store(address, narrow(total, out.dtype.element_ty), mask=inside)
    if dots is not None:
        tl.store(dots + col, row_dot, mask=inside_c)


@triton.jit(do_not_specialize=["ranges"])
def add_rows_kernel(out, parts, C, ranges, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """out (C) = column sums of parts (ranges, C), in blocks of BLOCK_M rows."""
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in tl.range(0, ranges, BLOCK_M):
        part = first + tl.arange(0, BLOCK_M)
        at = part[:, None].to(tl.int64) * C + col[None, :]
        total += tl.sum(tl.load(parts + at, mask=(part < ranges)[:, None] & (col < C)[None, :], other=0.0), axis=0)
    tl.store(out + col, total, mask=col < C)

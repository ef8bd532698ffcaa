"""A tile of what every row's v makes of its adapter's matrix: the sum over the rank."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import split_dot
from .tiles import load_vector, load_weights


@triton.jit
def sum_ranks(
    v, weight, d, d_there, row, inside_m, col, C, R, MAX_RANK, stride_v, stride_r, stride_c, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, RANK_FAST: tl.constexpr, WIDE: tl.constexpr,
    ROW: tl.constexpr, V_TERMS: tl.constexpr, B_TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """factor * (v_t * d) m^T for the rows and columns given, m (C, R); without ROW there is no d."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(0, R, BLOCK_R, num_stages=1):
        rank = first + tl.arange(0, BLOCK_R)
        # The first mask has the alignment of MAX_RANK, which the rank of one adapter need not have.
        at = row[:, None] * stride_v + rank[None, :]
        vt = tl.load(v + at, mask=inside_m[:, None] & (rank < MAX_RANK)[None, :], other=0.0) * factor
        if ROW:
            vt = vt * load_vector(d, d_there, rank, R, 1.0)[None, :]
        vt = tl.where((rank < R)[None, :], vt, 0.0)
        bt = load_weights(weight, rank[:, None], col[None, :], R, C, stride_r, stride_c, RANK_FAST, WIDE)
        if V_TERMS == 0:
            bt = bt.to(tl.float32)
        acc = split_dot(vt, bt, acc, V_TERMS, B_TERMS, PRECISION)
    return acc

"""The passes of split.py in Triton: plain kernels with one set of tiles, R at most 128.

Dropout bits come from Triton's own generator: a peer has no need of peftkern's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 128
# Row ranges of the pass over dy: each adds its part of dB atomically, as the published kernel does.
RANGES = 16


@triton.jit
def _drop_shrink(
    x, a, dropped, mask, S, seed, M, K, R, p, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    key = tl.load(seed)
    for first in tl.range(0, K, COLUMNS):
        col = first + tl.arange(0, COLUMNS)
        inside = (row < M)[:, None] & (col < K)[None, :]
        at = row[:, None].to(tl.int64) * K + col[None, :]
        # One call of the generator for four neighbours.
        four = row[:, None].to(tl.int64) * (K // 4 + 1) + first // 4 + tl.arange(0, COLUMNS // 4)[None, :]
        r0, r1, r2, r3 = tl.rand4x(key, four, n_rounds=7)
        keep = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (ROWS, COLUMNS)) >= p
        tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        kept = tl.where(keep, tile / (1 - p), 0.0).to(x.dtype.element_ty)
        tl.store(dropped + at, kept, mask=inside)
        tl.store(mask + at, keep.to(tl.uint8), mask=inside)
        at_rank = rank[None, :] * K + col[:, None]
        weights = tl.load(a + at_rank, mask=(rank < R)[None, :] & (col < K)[:, None], other=0.0)
        total = tl.dot(kept, weights, total, input_precision="ieee")
    at = row[:, None].to(tl.int64) * R + rank[None, :]
    tl.store(S + at, total.to(S.dtype.element_ty), mask=(row < M)[:, None] & (rank < R)[None, :])


def drop_shrink(x: Tensor, A: Tensor, p: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x', mask, S), see split.py."""
    if not p:
        return x, None, x @ A.t()
    (M, K), R = x.shape, A.shape[0]
    x, A, S = x.contiguous(), A.contiguous(), x.new_empty(M, R)
    dropped, mask = torch.empty_like(x), torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    seed = torch.randint(2**31 - 1, (1,), device=x.device)
    rows = 64 if M >= 8192 else 32 if M >= 4096 else 16
    _drop_shrink[(triton.cdiv(M, rows),)](
        x, A, dropped, mask, S, seed, M, K, R, p, ROWS=rows, COLUMNS=COLUMNS, RANK=_rank(R),
        num_warps=8 if rows == 64 else 4, num_stages=3,
    )  # fmt: skip
    return dropped, mask, S


@triton.jit
def _add_product(y, v, b, mask, M, N, R, stride_b_col, stride_b_rank, scaling, MASKED: tl.constexpr,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK)
    inside = (row < M)[:, None] & (col < N)[None, :]
    vt = tl.load(v + row[:, None].to(tl.int64) * R + rank[None, :], mask=(row < M)[:, None] & (rank < R)[None, :],
                 other=0.0)  # fmt: skip
    bt = tl.load(b + col[None, :] * stride_b_col + rank[:, None] * stride_b_rank,
                 mask=(rank < R)[:, None] & (col < N)[None, :], other=0.0)  # fmt: skip
    product = tl.dot(vt, bt, input_precision="ieee") * scaling
    at = row[:, None].to(tl.int64) * N + col[None, :]
    if MASKED:
        product = product * tl.load(mask + at, mask=inside, other=0).to(tl.float32)
    yt = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) + product
    tl.store(y + at, yt.to(y.dtype.element_ty), mask=inside)


def add_product(y: Tensor, v: Tensor, b: Tensor, scaling: float, mask: Tensor | None) -> None:
    """y += scaling * mask * (v b^T), see split.py."""
    (M, N), R = y.shape, v.shape[1]
    _add_product[(triton.cdiv(M, ROWS), triton.cdiv(N, COLUMNS))](
        y, v, b, mask, M, N, R, b.stride(0), b.stride(1), scaling, MASKED=mask is not None, ROWS=ROWS, COLUMNS=COLUMNS,
        RANK=_rank(R), num_warps=4,
    )  # fmt: skip


@triton.jit
def _adapter_grad(dy, S, b, dB, dS, M, N, R, rows_of_range, scaling, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                  RANK: tl.constexpr):  # fmt: skip
    # A program walks down a range of rows over a block of columns; both results are sums with other programs.
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * rows_of_range
    rank = tl.arange(0, RANK)
    bt = tl.load(b + col[:, None] * R + rank[None, :], mask=(col < N)[:, None] & (rank < R)[None, :], other=0.0)
    total = tl.zeros((COLUMNS, RANK), tl.float32)
    for start in tl.range(first, tl.minimum(first + rows_of_range, M), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (rank < R)[None, :]
        at = row[:, None].to(tl.int64) * R + rank[None, :]
        tile = tl.load(dy + row[:, None].to(tl.int64) * N + col[None, :], mask=(row < M)[:, None] & (col < N)[None, :],
                       other=0.0)  # fmt: skip
        st = tl.load(S + at, mask=inside, other=0.0)
        total = tl.dot(tl.trans(tile), st, total, input_precision="ieee")
        tl.atomic_add(dS + at, tl.dot(tile, bt, input_precision="ieee") * scaling, mask=inside, sem="relaxed")
    tl.atomic_add(dB + col[:, None] * R + rank[None, :], total * scaling,
                  mask=(col < N)[:, None] & (rank < R)[None, :], sem="relaxed")  # fmt: skip


def adapter_grad(dy: Tensor, S: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """(dB in fp32, dS), see split.py: fp32 atomics into zeros, and a cast of dS."""
    (M, N), R = dy.shape, S.shape[1]
    dy, B = dy.contiguous(), B.contiguous()
    dB, dS = (torch.zeros(rows, R, dtype=torch.float32, device=dy.device) for rows in (N, M))
    rows = triton.cdiv(triton.cdiv(M, RANGES), ROWS) * ROWS
    _adapter_grad[(triton.cdiv(N, COLUMNS), triton.cdiv(M, rows))](
        dy, S, B, dB, dS, M, N, R, rows, scaling, ROWS=ROWS, COLUMNS=COLUMNS, RANK=_rank(R), num_warps=4, num_stages=3,
    )  # fmt: skip
    return dB, dS.to(dy.dtype)


def _rank(R: int) -> int:
    return max(16, triton.next_power_of_2(R))

"""The two kernels of padded.py in Triton: plain tiles, one set of sizes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 128


@triton.jit
def _shrink(v, x, a, order, tiles, rows, K, R, stride_x, blocks, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
            RANK: tl.constexpr):  # fmt: skip
    # Grid (tiles, parts of K). v: (parts, rows in sorted order, R).
    tile, part = tl.program_id(0), tl.program_id(1)
    adapter = tl.load(tiles + tile * 3).to(tl.int64)
    place = tl.load(tiles + tile * 3 + 1) + tl.arange(0, ROWS)
    inside = place < tl.load(tiles + tile * 3 + 2)
    row = tl.load(order + place, mask=inside, other=0).to(tl.int64)
    rank = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for block in tl.range(part * blocks, tl.minimum((part + 1) * blocks, tl.cdiv(K, BLOCK_K))):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        xt = tl.load(x + row[:, None] * stride_x + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        at = tl.load(a + adapter * R * K + rank[None, :] * K + k[:, None], mask=(rank < R)[None, :] & (k < K)[:, None],
                     other=0.0)  # fmt: skip
        total = tl.dot(xt, at, total, input_precision="ieee")
    tl.store(v + (part * rows + place[:, None]) * R + rank[None, :], total, mask=inside[:, None] & (rank < R)[None, :])


def shrink(x: Tensor, A: Tensor, order: Tensor, tiles: Tensor, tile_rows: int, block_k: int, parts: int) -> Tensor:
    """v (parts, rows with an adapter, R) in fp32: parts of x A^T, A (adapters, R, K)."""
    (_, R, K), rows = A.shape, order.numel()
    v = torch.empty((parts, rows, R), dtype=torch.float32, device=x.device)
    _shrink[(len(tiles), parts)](
        v, x, A, order, tiles, rows, K, R, x.stride(0), triton.cdiv(triton.cdiv(K, block_k), parts), ROWS=tile_rows,
        BLOCK_K=block_k, RANK=_rank(R), num_warps=4, num_stages=3,
    )  # fmt: skip
    return v


@triton.jit
def _expand(y, v, b, order, tiles, scaling, rows, N, R, stride_y, PARTS: tl.constexpr, ROWS: tl.constexpr,
            BLOCK_N: tl.constexpr, RANK: tl.constexpr):  # fmt: skip
    # Grid (tiles, blocks of N).
    tile = tl.program_id(0)
    adapter = tl.load(tiles + tile * 3).to(tl.int64)
    place = tl.load(tiles + tile * 3 + 1) + tl.arange(0, ROWS)
    inside = place < tl.load(tiles + tile * 3 + 2)
    row = tl.load(order + place, mask=inside, other=0).to(tl.int64)
    rank = tl.arange(0, RANK)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = inside[:, None] & (rank < R)[None, :]
    total = tl.zeros((ROWS, RANK), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(v + (part * rows + place[:, None]) * R + rank[None, :], mask=known, other=0.0)
    bt = tl.load(b + adapter * N * R + col[None, :] * R + rank[:, None], mask=(col < N)[None, :] & (rank < R)[:, None],
                 other=0.0)  # fmt: skip
    scaled = (total * tl.load(scaling + adapter)).to(bt.dtype)
    at = y + row[:, None] * stride_y + col[None, :]
    mask = inside[:, None] & (col < N)[None, :]
    sums = tl.load(at, mask=mask, other=0.0).to(tl.float32) + tl.dot(scaled, bt, input_precision="ieee")
    tl.store(at, sums.to(y.dtype.element_ty), mask=mask)


def expand(y: Tensor, v: Tensor, B: Tensor, order: Tensor, tiles: Tensor, scaling: Tensor, tile_rows: int) -> None:
    """y += scaling (sum of v's parts) B^T at the rows of ``order``, B (adapters, N, R)."""
    (parts, rows, R), N = v.shape, B.shape[1]
    _expand[(len(tiles), triton.cdiv(N, BLOCK_N))](
        y, v, B, order, tiles, scaling, rows, N, R, y.stride(0), PARTS=parts, ROWS=tile_rows, BLOCK_N=BLOCK_N,
        RANK=_rank(R), num_warps=4,
    )  # fmt: skip


def _rank(R: int) -> int:
    return max(16, triton.next_power_of_2(R))

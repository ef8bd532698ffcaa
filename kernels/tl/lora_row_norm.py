"""lora_row_norm as launches: norms of the rows of W + s B A, from one read of W, dense or in codes.

A tile of the sum is made before it is squared: B A comes out of the tensor cores, W is added in registers. The sum over a
row runs in blocks of columns and strips of ``configs.STRIP``, whose sums are added in order by a second kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .call import Settings
from .configs import cdiv
from .lora_linear import add_rows
from .quantised.codes import Quantised, decode
from .tiles import multiple, split_dot


@triton.jit
def _chunk(
    acc, a, b, row, col, first, K, R, stride_a_rank, stride_a_k, stride_b_row, stride_b_rank,
    RANK: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc (None: fresh) + B A for RANK ranks from ``first`` on."""
    rank = first + tl.arange(0, RANK)
    inside = rank < R
    address = b + row[:, None].to(tl.int64) * stride_b_row + rank[None, :].to(tl.int64) * stride_b_rank
    bt = tl.load(address, mask=inside[None, :], other=0.0)
    address = a + rank[:, None].to(tl.int64) * stride_a_rank + col[None, :].to(tl.int64) * stride_a_k
    at = tl.load(address, mask=inside[:, None] & (col < K)[None, :], other=0.0)
    return split_dot(bt, at, acc, TERMS, TERMS, PRECISION)


@triton.jit
def row_norm_kernel(
    parts, w, a, b, N, K, R, stride_w_row, stride_w_col, stride_a_rank, stride_a_k, stride_b_row, stride_b_rank, scaling,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STRIP: tl.constexpr, RANK: tl.constexpr, CHUNKS: tl.constexpr,
    TERMS: tl.constexpr, R_ALIGN: tl.constexpr, B_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts (strips, N): sums of squares of W + scaling B A over STRIP columns. Grid (row tiles, strips).

    CHUNKS: chunks of RANK that the rank needs, 0 without a branch. TERMS: bf16 terms of A and of B.
    """
    R = multiple(R, R_ALIGN)
    stride_b_row = multiple(stride_b_row, B_ALIGN)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(rows, N - 1)
    start = tl.program_id(1) * STRIP
    total = tl.zeros((BLOCK_N,), tl.float32)
    # Masked rows, not repeated ones: where W is adjacent along them, they must be seen to be.
    if not hasattr(w, "codes"):
        at_row = w + rows[:, None].to(tl.int64) * stride_w_row
    for k in tl.range(start, tl.minimum(start + STRIP, K), BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        inside = (rows < N)[:, None] & (col < K)[None, :]
        if hasattr(w, "codes"):
            tile = decode(w, rows, k, N, K, BLOCK_K)
        else:
            tile = tl.load(at_row + col[None, :].to(tl.int64) * stride_w_col, mask=inside, other=0.0).to(tl.float32)
        if CHUNKS == 1:
            delta = _chunk(
                None, a, b, row, col, 0, K, R, stride_a_rank, stride_a_k, stride_b_row, stride_b_rank,
                RANK, TERMS, PRECISION,
            )  # fmt: skip
            tile += scaling * delta
        if CHUNKS > 1:
            delta = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for first in tl.range(0, R, RANK, num_stages=1):
                delta = _chunk(
                    delta, a, b, row, col, first, K, R, stride_a_rank, stride_a_k, stride_b_row, stride_b_rank,
                    RANK, TERMS, PRECISION,
                )  # fmt: skip
            tile += scaling * delta
        # Past the end A is zero, but zero times an infinite B is not.
        total += tl.sum(tl.where(inside, tile * tile, 0.0), axis=1)
    tl.store(parts + tl.program_id(1).to(tl.int64) * N + rows, total, mask=rows < N)


def row_norm(weight: Tensor | Quantised, lora_A: Tensor, lora_B: Tensor, scaling: float, s: Settings) -> Tensor:
    """fp32 (N,), the norms of the rows of weight (N, K) + scaling * lora_B lora_A."""
    (N, K), R = weight.shape, lora_A.shape[0]
    if N == 0 or K == 0:
        return torch.zeros(N, dtype=torch.float32, device=lora_A.device)
    codes = isinstance(weight, Quantised)
    size, w = (4, weight.codes) if codes else (weight.element_size(), weight)
    config = s.config("row_norm", configs.row_norm(R, size, s.arch), size)
    parts = torch.empty((cdiv(K, configs.STRIP), N), dtype=torch.float32, device=lora_A.device)
    row, column = (0, 0) if codes else weight.stride()
    strides = dict(
        stride_w_row=row, stride_w_col=column, stride_a_rank=lora_A.stride(0),
        stride_a_k=lora_A.stride(1), stride_b_row=lora_B.stride(0), stride_b_rank=lora_B.stride(1),
    )  # fmt: skip
    args = dict(parts=parts, w=w, a=lora_A, b=lora_B, N=N, K=K, R=R, **strides, scaling=scaling)
    # Both operands are adapters: three terms of each hold all of fp32, half precision enters as it is.
    split = (2 if s.allow_tf32 else 3) if lora_A.dtype == torch.float32 else 0
    constants = dict(
        BLOCK_N=config.block_m, BLOCK_K=config.block_c, STRIP=configs.STRIP, RANK=config.rank,
        CHUNKS=cdiv(R, config.rank), TERMS=split, R_ALIGN=configs.alignment(R),
        B_ALIGN=configs.alignment(strides["stride_b_row"]), PRECISION=s.precision,
    )  # fmt: skip
    grid = (cdiv(N, config.block_m), parts.shape[0])
    launch.submit(launch.Launch(row_norm_kernel, grid, args, constants, config.warps, config.stages))
    return add_rows(parts).sqrt_()

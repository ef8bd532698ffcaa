"""block_rotate as launches: blocks of columns of an activation, each times a matrix of its own, and those matrices' gradients.

A program takes a *unit* of columns: one block, or as many small ones as a tile of a tensor core holds, whose matrices are
then a tile with zeros beside its diagonal. Larger blocks are walked in tiles. Row sums run in ranges of rows, fixed by
the sizes, which are added in order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .call import Settings
from .configs import cdiv
from .lora_linear import add_rows, terms
from .tiles import narrow, split_dot


@triton.jit
def _columns(index, column, inside, K):
    """(where these columns are, whether they are there)."""
    if index is None:
        at = column.to(tl.int64)
    else:
        at = tl.load(index + column, mask=inside, other=0)
        inside = inside & (at >= 0) & (at < K)
    return at, inside


@triton.jit
def block_rotate_kernel(
    y, x, r, index, M, K, unit, stride_x_row, stride_x_col, stride_r_block, stride_r_row, stride_r_col,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    X_TERMS: tl.constexpr, R_TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (M, K) contiguous. Grid (row tiles, units * TILES): TILES tiles of BLOCK columns hold a unit."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) // TILES * unit
    j = tl.program_id(1) % TILES * BLOCK + tl.arange(0, BLOCK)
    inside_j = (j < unit) & (first + j < K)
    from_row = x + row[:, None].to(tl.int64) * stride_x_row
    inside_m = (row < M)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for start in tl.static_range(0, TILES * BLOCK, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at, inside_i = _columns(index, first + i, (i < unit) & (first + i < K), K)
        xt = tl.load(from_row + at[None, :] * stride_x_col, mask=inside_m & inside_i[None, :], other=0.0)
        same = (i // SIZE)[:, None] == (j // SIZE)[None, :]
        block = (first // SIZE + i // SIZE).to(tl.int64)
        address = r + (block * stride_r_block + i % SIZE * stride_r_row)[:, None] + (j % SIZE * stride_r_col)[None, :]
        rt = tl.load(address, mask=same & inside_i[:, None] & inside_j[None, :], other=0.0)
        total += split_dot(xt, rt, None, X_TERMS, R_TERMS, PRECISION)
    to, inside_j = _columns(index, first + j, inside_j, K)
    address = y + row[:, None].to(tl.int64) * K + to[None, :]
    tl.store(address, narrow(total, y.dtype.element_ty), mask=inside_m & inside_j[None, :])


@triton.jit(do_not_specialize=["M", "rows_per_program"])
def block_rotate_grad_kernel(
    parts, x, dy, index, M, K, unit, stride_x_row, stride_x_col, stride_dy_row, stride_dy_col, rows_per_program,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts (ranges, K, SIZE) = x^T dy within each block, of a range of rows. Grid (units * TILES^2, ranges)."""
    tile = tl.program_id(0)
    first = tile // (TILES * TILES) * unit
    i = tile // TILES % TILES * BLOCK + tl.arange(0, BLOCK)
    j = tile % TILES * BLOCK + tl.arange(0, BLOCK)
    valid_i, valid_j = (i < unit) & (first + i < K), (j < unit) & (first + j < K)
    at_i, inside_i = _columns(index, first + i, valid_i, K)
    at_j, inside_j = _columns(index, first + j, valid_j, K)
    start = tl.program_id(1) * rows_per_program
    stop = tl.minimum(start + rows_per_program, M)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for m in tl.range(start, stop, BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        inside = (row < stop)[:, None]
        at = row[:, None].to(tl.int64)
        xt = tl.load(x + at * stride_x_row + at_i[None, :] * stride_x_col, mask=inside & inside_i[None, :], other=0.0)
        dyt = tl.load(
            dy + at * stride_dy_row + at_j[None, :] * stride_dy_col, mask=inside & inside_j[None, :], other=0.0
        )
        total += split_dot(tl.trans(xt), dyt, None, 0, 0, PRECISION)
    same = (i // SIZE)[:, None] == (j // SIZE)[None, :]
    at = (tl.program_id(1).to(tl.int64) * K + first + i[:, None]) * SIZE + (j % SIZE)[None, :]
    tl.store(parts + at, total, mask=same & valid_i[:, None] & valid_j[None, :])


def _constants(size: int, config: configs.LaunchConfig, s: Settings) -> tuple[int, dict]:
    # (columns of a unit, what both kernels are compiled for)
    unit = max(config.block_c // size, 1) * size
    tiles = cdiv(unit, config.block_c)
    return unit, dict(SIZE=size, BLOCK_M=config.block_m, BLOCK=config.block_c, TILES=tiles, PRECISION=s.precision)


def block_rotate(x: Tensor, R: Tensor, index: Tensor | None, s: Settings) -> Tensor:
    """y (M, K) of x (M, K), R (K / b, b, b) or (1, b, b), index int64 (K) or None."""
    (M, K), size = x.shape, R.shape[1]
    y = torch.empty((M, K), dtype=x.dtype, device=x.device)
    config = s.config("block_rotate", configs.block_rotate(size, x.element_size()), x.element_size())
    unit, constants = _constants(size, config, s)
    constants["X_TERMS"], constants["R_TERMS"] = terms(x.dtype, R.dtype, False, s.allow_tf32)
    args = dict(
        y=y, x=x, r=R, index=index, M=M, K=K, unit=unit, stride_x_row=x.stride(0), stride_x_col=x.stride(1),
        stride_r_block=0 if R.shape[0] == 1 else R.stride(0), stride_r_row=R.stride(1), stride_r_col=R.stride(2),
    )  # fmt: skip
    grid = (cdiv(M, config.block_m), cdiv(K, unit) * constants["TILES"])
    launch.submit(launch.Launch(block_rotate_kernel, grid, args, constants, config.warps, config.stages))
    return y


def block_rotate_grad(x: Tensor, dy: Tensor, size: int, index: Tensor | None, s: Settings) -> Tensor:
    """fp32 (K / size, size, size)."""
    M, K = x.shape
    if M == 0 or K == 0:
        return torch.zeros((K // size, size, size), dtype=torch.float32, device=x.device)
    config = s.config("block_rotate", configs.block_rotate(size, x.element_size()), x.element_size())
    unit, constants = _constants(size, config, s)
    programs = cdiv(K, unit) * constants["TILES"] ** 2
    ranges, rows = configs.row_ranges(M, programs, config.block_m)
    parts = torch.empty((ranges, K * size), dtype=torch.float32, device=x.device)
    args = dict(
        parts=parts, x=x, dy=dy, index=index, M=M, K=K, unit=unit, stride_x_row=x.stride(0), stride_x_col=x.stride(1),
        stride_dy_row=dy.stride(0), stride_dy_col=dy.stride(1), rows_per_program=rows,
    )  # fmt: skip
    launch.submit(
        launch.Launch(block_rotate_grad_kernel, (programs, ranges), args, constants, config.warps, config.stages)
    )
    return add_rows(parts).view(-1, size, size)

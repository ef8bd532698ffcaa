"""Products with a weight as vendors make them. One in codes is decoded panel by panel into scratch that does not grow with it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs, launch
from ..configs import cdiv
from ..tiles import narrow
from .codes import Quantised, decode


@triton.jit
def panel_kernel(
    out, w, row0, block0, rows, columns, N, K, stride_out, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """out (rows, columns) = W from (row0, block0 * BLOCK_K) on, rounded. Grid (row tiles, column tiles)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = decode(w, row0 + n, (block0 + tl.program_id(1)) * BLOCK_K, N, K, BLOCK_K)
    inside = (n < rows)[:, None] & (k < columns)[None, :]
    tl.store(out + n.to(tl.int64)[:, None] * stride_out + k[None, :], narrow(tile, out.dtype.element_ty), mask=inside)


def _fill(panel: Tensor, w: Quantised, row0: int, col0: int, arch: int) -> Tensor:
    # col0 is a multiple of 128, and so of a tile.
    (rows, columns), (N, K) = panel.shape, w.shape
    config = configs.panel(panel.element_size(), arch)
    args = dict(
        out=panel, w=w.codes, row0=row0, block0=col0 // config.block_c, rows=rows, columns=columns, N=N, K=K,
        stride_out=panel.stride(0),
    )  # fmt: skip
    constants = dict(BLOCK_N=config.block_m, BLOCK_K=config.block_c)
    grid = (cdiv(rows, config.block_m), cdiv(columns, config.block_c))
    launch.submit(launch.Launch(panel_kernel, grid, args, constants, config.warps, config.stages))
    return panel


def times(a: Tensor, w: Tensor | Quantised, arch: int) -> Tensor:
    """a (M, C) w^T, w (D, C), in a's dtype, by the vendor.

    Panels of W are taken along D, so that each sum is made at once: rows of W, or columns where ``w`` is its transpose.
    """
    if isinstance(w, Tensor):
        return a @ w.t()
    (D, C), out = w.shape, a.new_empty((a.shape[0], w.shape[0]))
    if C == 0:
        return out.zero_()
    each = min(D, configs.panel_columns(C, a.element_size()))
    scratch = a.new_empty((C, each) if w.transposed else (each, C))
    for first in range(0, D, each):
        count = min(each, D - first)
        if w.transposed:
            panel = _fill(scratch[:, :count], w.t(), 0, first, arch)
        else:
            panel = _fill(scratch[:count], w, first, 0, arch).t()
        torch.mm(a, panel, out=out[:, first : first + count])
    return out

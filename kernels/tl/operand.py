"""How matrices are read, and the loader of the base: a tile of W in, (BLOCK_K, BLOCK_N) in the activation's dtype out.

A dense W lies by column (a row of memory is one output column) or by k, and is copied through a tensor descriptor where
there is one. One in codes (codes.py) is decoded: in fp32, for the product to round. The products above take tiles and know
nothing of this.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .quantised.codes import Codes, Quantised, decode

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before host descriptors
    TensorDescriptor = None

# Offsets within a tile of at most 128 rows are 32-bit.
MAX_ROW_STRIDE = 1 << 24


def rows_of(t: Tensor) -> Tensor:
    """``t`` (rows, columns) with unit stride along columns; copied if it has none, or rows absurdly far apart."""
    return t if (t.shape[1] <= 1 or t.stride(1) == 1) and t.stride(0) < MAX_ROW_STRIDE else t.contiguous()


def row_stride(t: Tensor) -> int:
    """Elements from one row to the next."""
    return t.stride(0) if t.shape[0] > 1 else t.shape[1]


def vector(t: Tensor | None) -> Tensor | None:
    """Unit stride."""
    return None if t is None else t.contiguous()


def by_column(w: Tensor | Quantised) -> tuple[Tensor | Codes, bool]:
    """(matrix with unit stride along its second axis, or codes, whether it is ``w`` (N, K) itself and not its transpose)."""
    if isinstance(w, Quantised):
        return w.codes, not w.transposed
    if w.stride(1) != 1 and w.stride(0) == 1:
        return w.t(), False
    return rows_of(w), True


def descriptor(t: Tensor, block: list[int]):
    """``t`` for copies of such blocks; see ``describable``."""
    return TensorDescriptor(t, list(t.shape), [row_stride(t), 1], block)


def describable(t: Tensor) -> bool:
    """Whether there are descriptors, and one of ``t``."""
    if TensorDescriptor is None:
        return False
    bytes_per_row = row_stride(t) * t.element_size()
    return t.data_ptr() % 16 == 0 and bytes_per_row % 16 == 0 and 0 not in t.shape and t.stride(1) == 1


@triton.jit
def first_tile(w, col, depth, N, stride_w, W_BY_COLUMN: tl.constexpr, TMA: tl.constexpr):
    """Where the tile of k = 0 is: its elements' addresses, or the descriptor. Not for codes."""
    if TMA:
        at = w
    elif W_BY_COLUMN:
        # The clamp instead of a mask: what a column past the end computes is never stored.
        at = w + tl.minimum(col, N - 1)[:, None].to(tl.int64) * stride_w + depth[None, :]
    else:
        at = w + depth[:, None].to(tl.int64) * stride_w + col[None, :]
    return at


@triton.jit
def load_tile(
    w, k, col0, col, depth, N, K, W_BY_COLUMN: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr
):  # fmt: skip
    """Elements (k + depth, col) of W^T at the tile's place ``w`` (``first_tile``); what is past K is zero."""
    if hasattr(w, "codes"):
        if W_BY_COLUMN:
            tile = tl.trans(decode(w, col, k, N, K, depth.shape[0]))
        else:
            tile = decode(w, k + depth, col0, K, N, col.shape[0])
    elif TMA:
        if W_BY_COLUMN:
            tile = tl.trans(w.load([col0, k]))
        else:
            tile = w.load([k, col0])
    elif W_BY_COLUMN:
        if EVEN_K:
            tile = tl.trans(tl.load(w))
        else:
            tile = tl.trans(tl.load(w, mask=(k + depth < K)[None, :], other=0.0))
    else:
        if EVEN_K:
            tile = tl.load(w, mask=(col < N)[None, :], other=0.0)
        else:
            tile = tl.load(w, mask=(k + depth < K)[:, None] & (col < N)[None, :], other=0.0)
    return tile


@triton.jit
def next_tile(w, stride_w, BLOCK_K: tl.constexpr, W_BY_COLUMN: tl.constexpr):
    """The addresses BLOCK_K further on along k."""
    if W_BY_COLUMN:
        w += BLOCK_K
    else:
        w += tl.cast(stride_w, tl.int64) * BLOCK_K
    return w

"""The vectors of adapters: rows times their adapter's vector, and column sums over the rows of each adapter.

    out_t = in_t * z[a_t]                                          what enters a base product, and du = d * dv
    g[a] = factor sum_{t: a_t = a} p_t * q_t                       gradients; q a matrix, 1, or v_t m[a]^T

The gradient of a vector that scales a product's columns is a column sum with that product made again: dg_d is
sum_t dy_t * s ((d * u_t) B^T), dp_d is sum_t drop(x_t) * (du_t A). One program adds all rows of one adapter, in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs, launch
from ..configs import cdiv
from ..dropout import keep_tile
from ..operand import row_stride, rows_of
from ..tiles import narrow
from . import configs as multi_configs
from . import tiles
from .batch import Batch
from .ranks import sum_ranks
from .tiles import (
    COLUMNS,
    RANK,
    D,
    dropout_of,
    find_matrix,
    find_tile,
    find_vector,
    load_vector,
    pointer_to,
    store_vector,
)


@triton.jit(do_not_specialize=["M", "slots", "count", "numbers"])
def multi_scale_rows_kernel(
    out, t, vectors, count, table, order, starts, M, C, slots, numbers, stride_out, stride_t,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, BY_RANK: tl.constexpr, BY_ROW: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    """Grid (tile numbers, column blocks). BY_RANK: the vectors have the length of their adapter's rank, else C."""
    segment, first_place, end = find_tile(starts, tl.program_id(0), M, slots, BLOCK_M, BY_ROW, SEARCH)
    if first_place < end:
        place = first_place + tl.arange(0, BLOCK_M)
        row = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
        col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (place < end)[:, None] & (col < C)[None, :]
        value = tl.load(t + row[:, None] * stride_t + col[None, :], mask=inside, other=0.0)
        vector, there, _ = find_vector(vectors, count, table, segment, segment < slots, VECTOR)
        if there:
            length = tl.cast(C, tl.int32)
            if BY_RANK:
                length = tl.load(table + tl.cast(segment, tl.int64) * COLUMNS + RANK).to(tl.int32)
            scaled = value.to(tl.float32) * load_vector(vector, there, col, length, 1.0)[None, :]
            value = narrow(scaled, out.dtype.element_ty)
        tl.store(out + row[:, None] * stride_out + col[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["slots", "count", "tensors"])
def multi_column_sums_kernel(
    grads, p, q, v, addresses, tensors, vectors, count, table, order, starts, scaling, dropout_p, seed,
    C, MAX_RANK, slots, stride_p, stride_q, stride_v,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, VECTOR: tl.constexpr, BY_RANK: tl.constexpr,
    ROW: tl.constexpr, SIDE_B: tl.constexpr, RANK_FAST: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (slots, column blocks). grads: addresses of the vectors' gradients, 0 for one that is not wanted.

    The second factor is ``q`` (M, C), or ``v`` (M, MAX_RANK), times d with ROW, times the adapter's matrix, or 1. With
    ``seed`` p is dropped. BY_RANK: C is the largest rank, the vectors have their adapter's, beyond which nothing counts.
    """
    slot = tl.program_id(0)
    begin = tl.load(starts + slot)
    end = tl.load(starts + slot + 1)
    grad, there, _ = find_vector(grads, count, table, slot, slot >= 0, VECTOR)
    wanted = there & (grad.to(tl.int64) != 0)
    if wanted & (begin < end):
        col0 = tl.program_id(1) * BLOCK_C
        col = col0 + tl.arange(0, BLOCK_C)
        length = tl.cast(C, tl.int32)
        if BY_RANK:
            length = tl.load(table + tl.cast(slot, tl.int64) * COLUMNS + RANK).to(tl.int32)
        factor = tl.cast(1.0, tl.float32)
        if scaling is not None:
            factor = tl.load(scaling + slot)
        if seed is not None:
            threshold, factor = dropout_of(dropout_p, slot)
            key = tl.load(seed)
        if v is not None:
            address, R, stride_r, stride_c, wide, _, _ = find_matrix(
                addresses, tensors, table, slot, SIDE_B, RANK_FAST, DTYPE
            )
            d, d_there, _ = find_vector(vectors, count, table, slot, slot >= 0, D)
        total = tl.zeros((BLOCK_C,), tl.float32)
        # The gradient of a vector in fp32 is exact to fp32, whatever the rows' dtype.
        for first in tl.range(begin, end, BLOCK_M):
            place = first + tl.arange(0, BLOCK_M)
            inside_m = place < end
            row = tl.load(order + place, mask=inside_m, other=0).to(tl.int64)
            inside = inside_m[:, None] & (col < C)[None, :]
            value = tl.load(p + row[:, None] * stride_p + col[None, :], mask=inside, other=0.0).to(tl.float32)
            if seed is not None:
                value = tl.where(keep_tile(key, row, col0, threshold, BLOCK_C), value, 0.0)
            if q is not None:
                value *= tl.load(q + row[:, None] * stride_q + col[None, :], mask=inside, other=0.0).to(tl.float32)
            if v is not None:
                if wide:
                    value *= sum_ranks(
                        v, pointer_to(address, DTYPE, True), d, d_there, row, inside_m, col, C, R, MAX_RANK, stride_v,
                        stride_r, stride_c, 1.0, BLOCK_M, BLOCK_C, BLOCK_R, RANK_FAST, True, ROW, 0, 0, "ieee",
                    )  # fmt: skip
                else:
                    value *= sum_ranks(
                        v, pointer_to(address, DTYPE, False), d, d_there, row, inside_m, col, C, R, MAX_RANK, stride_v,
                        stride_r, stride_c, 1.0, BLOCK_M, BLOCK_C, BLOCK_R, RANK_FAST, False, ROW, 0, 0, "ieee",
                    )  # fmt: skip
            total += tl.sum(value, axis=0)
        store_vector(grad, total * factor, col, length)


def _place(symbol: str) -> int:
    return getattr(tiles, symbol.upper()).value


def scale_rows(b: Batch, symbol: str, t: Tensor) -> Tensor:
    """t (M, C), each row times its adapter's vector of that symbol."""
    out, (M, C) = torch.empty(t.shape, dtype=t.dtype, device=t.device), t.shape
    if M == 0 or C == 0:
        return out
    numbers, constants = b.tiles(multi_configs.TILE_ROWS)
    args = dict(
        out=out, t=t, order=b.order, C=C, numbers=numbers, stride_out=row_stride(out), stride_t=row_stride(t), **b.vectors,
        **b.route,
    )  # fmt: skip
    constants |= dict(BLOCK_C=128, VECTOR=_place(symbol), BY_RANK=symbol == "d")
    launch.submit(launch.Launch(multi_scale_rows_kernel, (numbers, cdiv(C, 128)), args, constants))
    return out


def own_bias(b: Batch) -> Tensor:
    """bool (M): whether a row's adapter has a bias of its own."""
    place = torch.arange(b.order.shape[0], dtype=torch.int32, device=b.order.device)
    segment = torch.searchsorted(b.starts, place, right=True) - 1
    column = tiles.VECTORS.value + 2 * _place("beta")
    has = torch.cat([b.table[:, column] >= 0, torch.zeros(2, dtype=torch.bool, device=place.device)])
    return torch.empty_like(place, dtype=torch.bool).index_put_((b.order.long(),), has[segment])


@dataclass(frozen=True)
class VectorGrads:
    """Gradients of a batch's vectors. ``grads``: addresses of what they are added up in, 0 where none is wanted."""

    b: Batch
    grads: Tensor

    def of_branch(self, dy: Tensor, x: Tensor | None, u: Tensor, dv: Tensor, du: Tensor) -> None:
        """Those of d, g_d and p_d, each if it acts."""
        if "d" in self.b.acting:
            self.column_sums("d", dv, u)
        if "g_d" in self.b.acting:
            self._submit("g_d", dy, None, u)
        if "p_d" in self.b.acting and x is not None:
            self._submit("p_d", x, None, du)

    def column_sums(self, symbol: str, p: Tensor, q: Tensor | None = None) -> None:
        """The gradient of that symbol is the sum of p, or of p * q, over an adapter's rows."""
        if symbol in self.b.acting:
            self._submit(symbol, p, q, None)

    def _submit(self, symbol: str, p: Tensor, q: Tensor | None, v: Tensor | None) -> None:
        # With v: the branch again, from the side of the vector.
        b, (M, C), side_b = self.b, p.shape, symbol != "p_d"
        if M == 0 or C == 0 or b.slots == 0:
            return
        drops = v is not None and not side_b and b.dropout_p is not None
        q = None if q is None else rows_of(q)
        args = dict(
            grads=self.grads, p=p, q=q, v=v, order=b.order, table=b.table, starts=b.starts, slots=b.slots, C=C,
            scaling=b.scale(side_b) if v is not None else None, dropout_p=b.dropout_p if drops else None,
            seed=b.seed if drops else None, MAX_RANK=b.max_rank, stride_p=row_stride(p),
            stride_q=0 if q is None else row_stride(q), stride_v=0 if v is None else row_stride(v), **b.weights, **b.vectors,
        )  # fmt: skip
        constants = dict(
            BLOCK_M=multi_configs.TILE_ROWS, BLOCK_C=64, BLOCK_R=min(configs.rank_block(max(b.max_rank, 1)), 32),
            VECTOR=_place(symbol), BY_RANK=symbol == "d", ROW=side_b and "d" in b.acting, **b.matrix(side_b),
        )  # fmt: skip
        launch.submit(launch.Launch(multi_column_sums_kernel, (b.slots, cdiv(C, 64)), args, constants))

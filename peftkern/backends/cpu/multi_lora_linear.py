"""multi_lora_linear on CPU: the base product with, for every row, the branch of that row's adapter around it.

A batch is cut into segments, the rows of one adapter, which are read and written in place through the route. Forward:
one pass over x gives u; the base product's epilogue adds branch and bias to each block it completes. Backward: one
pass over dy gives du and the gradients of B, one over x those of A, each adapter's rows summed in a fixed order; the
input gradient is the forward pattern with W and A. Adapters stored as panels (adjacent columns, fp32, whole vectors)
are read where they lie, others tile by tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import base_product
from .native import _C, CODES, pointer, threads, vector


def multi_lora_linear_route(ids, table, mask):
    """(order, starts); see peftkern.ops.multi_lora_linear."""
    ids, table, slots = ids.reshape(-1).contiguous(), table.contiguous(), table.shape[0]
    order = torch.empty(ids.numel(), dtype=torch.int32)
    starts = torch.empty(slots + 3, dtype=torch.int32)
    invalid = _C.multi_route(
        ids.data_ptr(), ids.dtype == torch.int64, ids.numel(), table.data_ptr(), slots, mask, order.data_ptr(),
        starts.data_ptr(),
    )  # fmt: skip
    if invalid >= 0:
        bad = ids[invalid].item()
        raise ValueError(f"adapter_ids holds {bad}, which is no adapter of the {slots} here (-1 means base only)")
    return order, starts


class _Batch:
    """What all kernels of a call share, and the tensors that its addresses point into."""

    __slots__ = ("M", "held", "max_rank", "native")

    def __init__(self, weights, table, scaling, order, starts, max_rank: int, dropout_p, seed):
        table, order, starts = table.contiguous(), order.contiguous(), starts.contiguous()
        scaling = None if scaling is None else scaling.contiguous()
        dropout_p = None if dropout_p is None else dropout_p.contiguous()
        self.M, self.max_rank, self.held = order.shape[0], max_rank, (weights, table, order, starts)
        self.native = _C.MultiBatch(
            [w.data_ptr() for w in weights], CODES[weights[0].dtype] if weights else 0, table.data_ptr(),
            table.shape[0], order.data_ptr(), starts.data_ptr(), self.M, max_rank, pointer(scaling), pointer(dropout_p),
            0 if dropout_p is None else int(seed.item()) & (2**64 - 1),
        )  # fmt: skip

    def reduce(
        self, side_b: bool, t: Tensor, *, dot: Tensor | None = None, v: Tensor | None = None, grads=(),
        colsum: Tensor | None = None,
    ) -> None:  # fmt: skip
        """One pass over t (M, C): ``dot`` (M, max_rank) gets each row's products with its adapter's panel; ``grads``
        (addresses per tensor of weights, 0 for none) the sums of ``v^T t`` over each adapter's rows; ``colsum`` (C) the
        sum of all rows."""
        M, C = t.shape
        _C.multi_reduce(
            self.native, side_b, t.data_ptr(), CODES[t.dtype], *t.stride(), C, pointer(dot), pointer(v), grads,
            pointer(colsum), threads(M * C * max(self.max_rank, 1)),
        )  # fmt: skip

    def expand(self, side_b: bool, out: Tensor, src: Tensor | None, v: Tensor, row0=0, col0=0, bias=None) -> None:
        """``out = round(src + each row's v times its panel + bias)`` for the block of rows and columns at (row0, col0)."""
        m, c = out.shape
        _C.multi_expand(
            self.native, side_b, out.data_ptr(), CODES[out.dtype], out.stride(0),
            pointer(src), 0 if src is None else CODES[src.dtype], 0 if src is None else src.stride(0),
            row0, m, col0, c, v.data_ptr(), pointer(bias), threads(m * c * max(self.max_rank, 1)),
        )  # fmt: skip

    def onto_base(
        self, side_b: bool, a: Tensor, weight: Tensor | None, out: Tensor, v: Tensor, bias=None, way=None
    ) -> None:
        """``out`` (M, D) = the base product of a (zero without weight) + branch + bias."""
        if out.numel() == 0:
            return
        if weight is None:
            self.expand(side_b, out, None, v, bias=bias)
            return

        def epilogue(r0: int, r1: int, c0: int, c1: int, block: Tensor | None) -> None:
            part = out[r0:r1, c0:c1]
            self.expand(side_b, part, part if block is None else block, v, r0, c0, bias)

        base_product(a, weight, transpose=side_b, in_scale=None, out=out, epilogue=epilogue, way=way)


def multi_lora_linear_fwd(
    x, weight, out_features, bias, weights, table, scaling, max_rank, order, starts, dropout_p, seed, *, way=None
):
    """(y, u); see peftkern.ops.multi_lora_linear."""
    if weight is None and bias is None and dropout_p is None:
        y = torch.empty((x.shape[0], out_features), dtype=x.dtype)
        return y, _branch(y, x, weights, table, scaling, max_rank, order, starts, add=False)
    batch = _Batch(weights, table, scaling, order, starts, max_rank, dropout_p, seed)
    u = torch.empty((batch.M, max_rank), dtype=torch.float32)
    batch.reduce(False, x, dot=u)
    y = torch.empty((batch.M, out_features), dtype=x.dtype)
    batch.onto_base(True, x, weight, y, u, vector(bias), way)
    return y, u


def sgmv_add(out, x, weights, table, scaling, max_rank, order, starts):
    """Adds the branch to ``out``; see peftkern.ops.sgmv."""
    args = x, weights, table, scaling, max_rank, order, starts
    if out.stride(1) == 1 and (out.stride(0) >= out.shape[1] or out.shape[0] == 1):
        _branch(out, *args, add=True)
    else:
        copy = out.contiguous()
        _branch(copy, *args, add=True)
        out.copy_(copy)


def _branch(out, x, weights, table, scaling, max_rank, order, starts, *, add: bool):
    # u; out = the branch, or plus it.
    table, order, starts, scaling = table.contiguous(), order.contiguous(), starts.contiguous(), scaling.contiguous()
    (M, K), N = x.shape, out.shape[1]
    u = torch.empty((M, max_rank), dtype=torch.float32)
    _C.multi_branch(
        [w.data_ptr() for w in weights], CODES[weights[0].dtype] if weights else 0, table.data_ptr(), table.shape[0],
        order.data_ptr(), starts.data_ptr(), M, max_rank, scaling.data_ptr(), x.data_ptr(), CODES[x.dtype],
        *x.stride(), K, u.data_ptr(), out.data_ptr(), out.stride(0), N, add, threads(M * min(K, N) * max(max_rank, 1)),
    )  # fmt: skip
    return u


def multi_lora_linear_bwd_adapter(dy, x, u, weights, table, scaling, order, starts, dropout_p, seed, need, need_bias):
    """(du, dbias, gradients like weights); see peftkern.ops.multi_lora_linear."""
    batch = _Batch(weights, table, scaling, order, starts, u.shape[1], dropout_p, seed)
    # Zero where no row's adapter lies.
    grads = [torch.zeros_like(w) if n else w.new_empty(0) for w, n in zip(weights, need, strict=True)]
    addresses = [g.data_ptr() if n else 0 for g, n in zip(grads, need, strict=True)] if any(need) else ()
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    dbias = torch.empty(dy.shape[1] if need_bias else 0, dtype=torch.float32)
    batch.reduce(True, dy, dot=du, v=u.contiguous(), grads=addresses, colsum=dbias if need_bias else None)
    if addresses and x is not None:
        batch.reduce(False, x, v=du, grads=addresses)
    return du, dbias, grads


def multi_lora_linear_bwd_input(
    dy, du, weight, in_features, weights, table, order, starts, dropout_p, seed, *, way=None
):
    """dx; see peftkern.ops.multi_lora_linear."""
    batch = _Batch(weights, table, None, order, starts, du.shape[1], dropout_p, seed)
    dx = torch.empty((batch.M, in_features), dtype=dy.dtype)
    batch.onto_base(False, dy, weight, dx, du.contiguous(), way=way)
    return dx


OPS = {
    "multi_lora_linear_route": multi_lora_linear_route,
    "multi_lora_linear_fwd": multi_lora_linear_fwd,
    "multi_lora_linear_bwd_adapter": multi_lora_linear_bwd_adapter,
    "multi_lora_linear_bwd_input": multi_lora_linear_bwd_input,
    "sgmv_add": sgmv_add,
}

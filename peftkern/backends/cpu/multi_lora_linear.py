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


def multi_lora_linear_route(c, way):
    """(order, starts); see peftkern.ops.multi_lora_linear."""
    ids, table, slots = c.ids.reshape(-1).contiguous(), c.table.contiguous(), c.table.shape[0]
    order = torch.empty(ids.numel(), dtype=torch.int32)
    starts = torch.empty(slots + 3, dtype=torch.int32)
    invalid = _C.multi_route(
        ids.data_ptr(), ids.dtype == torch.int64, ids.numel(), table.data_ptr(), slots, c.mask, order.data_ptr(),
        starts.data_ptr(),
    )  # fmt: skip
    if invalid >= 0:
        bad = ids[invalid].item()
        raise ValueError(f"adapter_ids holds {bad}, which is no adapter of the {slots} here (-1 means base only)")
    return order, starts


class _Batch:
    """What all kernels of a call share, and the tensors that its addresses point into."""

    __slots__ = ("M", "held", "max_rank", "native")

    def __init__(self, c, max_rank: int):
        table, order, starts, scaling = (t.contiguous() for t in (c.table, c.order, c.starts, c.scaling))
        dropout_p = None if c.dropout_p is None else c.dropout_p.contiguous()
        weights = c.weights
        self.M, self.max_rank, self.held = order.shape[0], max_rank, (weights, table, order, starts, scaling, dropout_p)
        self.native = _C.MultiBatch(
            [w.data_ptr() for w in weights], CODES[weights[0].dtype] if weights else 0, table.data_ptr(),
            table.shape[0], order.data_ptr(), starts.data_ptr(), self.M, max_rank, scaling.data_ptr(), pointer(dropout_p),
            0 if dropout_p is None else int(c.seed.item()) & (2**64 - 1),
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

    def onto_base(self, side_b: bool, a: Tensor, c, out: Tensor, v: Tensor, way, bias=None) -> None:
        """``out`` (M, D) = the base of ``a`` (zero without one) + branch + bias."""
        if out.numel() == 0:
            return
        if not c.base:
            self.expand(side_b, out, a.contiguous() if c.kind == "identity" else None, v, bias=bias)
            return

        def epilogue(r0: int, r1: int, c0: int, c1: int, block: Tensor | None) -> None:
            part = out[r0:r1, c0:c1]
            self.expand(side_b, part, part if block is None else block, v, r0, c0, bias)

        base_product(a, c.base[0], transpose=side_b, in_scale=None, out=out, epilogue=epilogue, way=way)


def multi_lora_linear_fwd(c, way):
    """(y, u); see peftkern.ops.multi_lora_linear."""
    y = torch.empty((c.x.shape[0], c.out_features), dtype=c.x.dtype)
    if c.kind == "none" and c.bias is None and c.dropout_p is None:
        return y, _branch(y, c, add=False)
    batch = _Batch(c, c.max_rank)
    u = torch.empty((batch.M, c.max_rank), dtype=torch.float32)
    batch.reduce(False, c.x, dot=u)
    batch.onto_base(True, c.x, c, y, u, way, vector(c.bias))
    return y, u


def sgmv_add(c, way):
    """Adds the branch to ``out``; see peftkern.ops.sgmv."""
    out = c.out
    if out.stride(1) == 1 and (out.stride(0) >= out.shape[1] or out.shape[0] == 1):
        _branch(out, c, add=True)
    else:
        copy = out.contiguous()
        _branch(copy, c, add=True)
        out.copy_(copy)


def _branch(out: Tensor, c, *, add: bool) -> Tensor:
    # u; out = the branch, or plus it.
    x, weights, max_rank = c.x, c.weights, c.max_rank
    table, order, starts, scaling = (t.contiguous() for t in (c.table, c.order, c.starts, c.scaling))
    (M, K), N = x.shape, out.shape[1]
    u = torch.empty((M, max_rank), dtype=torch.float32)
    _C.multi_branch(
        [w.data_ptr() for w in weights], CODES[weights[0].dtype] if weights else 0, table.data_ptr(), table.shape[0],
        order.data_ptr(), starts.data_ptr(), M, max_rank, scaling.data_ptr(), x.data_ptr(), CODES[x.dtype],
        *x.stride(), K, u.data_ptr(), out.data_ptr(), out.stride(0), N, add, threads(M * min(K, N) * max(max_rank, 1)),
    )  # fmt: skip
    return u


def multi_lora_linear_bwd(c, way):
    """(dx, dbias, gradients like weights); see peftkern.ops.multi_lora_linear."""
    batch = _Batch(c, c.u.shape[1])
    # Zero where no row's adapter lies.
    grads = [torch.zeros_like(w) if n else w.new_empty(0) for w, n in zip(c.weights, c.need, strict=True)]
    addresses = [g.data_ptr() if n else 0 for g, n in zip(grads, c.need, strict=True)] if any(c.need) else ()
    du = torch.empty_like(c.u, memory_format=torch.contiguous_format)
    dbias = torch.empty(c.dy.shape[1] if c.need_bias else 0, dtype=torch.float32)
    colsum = dbias if c.need_bias else None
    batch.reduce(True, c.dy, dot=du, v=c.u.contiguous(), grads=addresses, colsum=colsum)
    if addresses and c.x is not None:
        batch.reduce(False, c.x, v=du, grads=addresses)
    dx = torch.empty((batch.M, c.in_features) if c.need_x else 0, dtype=c.dy.dtype)
    if c.need_x:
        batch.onto_base(False, c.dy, c, dx, du, way)
    return dx, dbias, grads


OPS = {
    "multi_lora_linear_route": multi_lora_linear_route,
    "multi_lora_linear_fwd": multi_lora_linear_fwd,
    "multi_lora_linear_bwd": multi_lora_linear_bwd,
    "sgmv_add": sgmv_add,
}

"""multi_lora_linear on CPU: one native call a pass (csrc/cpu/multi/linear.h), with the base product by whoever is fastest.

A batch is cut into segments, the rows of one adapter, which are read and written in place through the route. Forward:
one pass over x gives u; the base product's epilogue adds branch and bias to each block it completes. Backward: one
pass over dy gives du and the gradients of B, one over x those of A, each adapter's rows summed in a fixed order; the
input gradient is the forward pattern with W and A. Adapters stored as panels (adjacent columns, fp32, whole vectors)
are read where they lie, others tile by tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..marshal import copied, memory
from . import call, multi_call
from .call import weight_of
from .native import _C


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


def _adapters(c, max_rank: int, K: int, N: int):
    weights, vectors = ([memory(t) for t in tensors] for tensors in (c.weights, c.vectors or ()))
    table, scaling = c.table.contiguous(), c.scaling.contiguous()
    return multi_call.adapters(weights, table, scaling, max_rank, K, N, False, vectors)


def multi_lora_linear_fwd(c, way):
    """(y, u, h); see peftkern.ops.multi_lora_linear."""
    given = _adapters(c, c.max_rank, c.x.shape[1], c.out_features)
    args = (
        way.now, torch.get_num_threads(), c.x, c.kind, weight_of(c.base), c.bias, given, c.order, c.starts, c.dropout_p, c.seed,
        True, c.save_base,
    )  # fmt: skip
    y, u, h = call.answered(multi_call.forward, multi_call.learn_forward, args, call.kind_of(c, way))
    return y, u, c.x.new_empty(0) if h is None else h


def multi_lora_linear_bwd(c, way):
    """(dx, dbias, gradients like weights, gradients like vectors); see peftkern.ops.multi_lora_linear."""
    given = _adapters(c, c.u.shape[1], c.in_features, c.dy.shape[1])
    args = (
        way.now, torch.get_num_threads(), c.dy, c.x, c.u, c.kind, weight_of(c.base), given, c.order, c.starts, c.dropout_p,
        c.seed, c.need_x, c.need_bias, tuple(c.need), c.h, tuple(c.wants_vectors),
    )  # fmt: skip
    dx, dbias, *grads = call.answered(multi_call.backward, multi_call.learn_backward, args, call.kind_of(c, way))
    grads, sums = map(_alike, grads, (c.weights, c.vectors or ()))
    return c.dy.new_empty(0) if dx is None else dx, c.u.new_empty(0) if dbias is None else dbias, grads, sums


def _alike(grads: list[Tensor | None], tensors: list[Tensor]) -> list[Tensor]:
    """Gradients in the layout of what they are of, empty where there is none."""
    return [
        t.new_empty(0) if g is None else g if t.is_contiguous() else g.as_strided(t.shape, t.stride())
        for g, t in zip(grads, tensors, strict=True)
    ]


def _add(c, way) -> bool:
    given = _adapters(c, c.max_rank, c.x.shape[1], c.out.shape[1])
    args = way.now, torch.get_num_threads(), c.out, c.x, given, c.order, c.starts
    return bool(multi_call.add(*args) or (multi_call.learn_add(*args) and multi_call.add(*args)))


def sgmv_add(c, way):
    """Adds the branch to ``out``; see peftkern.ops.sgmv."""
    if _add(c, way):
        return
    copy = c._replace(out=copied(c.out), x=copied(c.x), order=copied(c.order), starts=copied(c.starts))
    if not _add(copy, way):
        raise RuntimeError("the C++ extension takes no call like this one: arguments do not fit")
    c.out.copy_(copy.out)


OPS = {
    "multi_lora_linear_route": multi_lora_linear_route,
    "multi_lora_linear_fwd": multi_lora_linear_fwd,
    "multi_lora_linear_bwd": multi_lora_linear_bwd,
    "sgmv_add": sgmv_add,
}

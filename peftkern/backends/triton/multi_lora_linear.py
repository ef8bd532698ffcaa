"""multi_lora_linear on Triton: the ops' arguments as a batch, on the device and stream of the call."""

from __future__ import annotations

from .device import kernel_settings, on_device
from .operand import weight_of


def multi_lora_linear_route(c, way):
    """(order, starts), see ``peftkern.ops.multi_lora_linear``."""
    from ...kernels.multi.route import route

    ids, slots = c.ids, c.table.shape[0]
    with on_device(ids):
        order, starts = route(ids, c.table, c.mask)
    # Only where it makes nobody wait: in the interpreter, on CPU tensors.
    if ids.device.type == "cpu" and starts[slots + 1] < ids.numel():
        bad = ids.reshape(-1)[order[starts[slots + 1]].long()].item()
        raise ValueError(f"adapter_ids holds {bad}, which is no adapter of the {slots} here (-1 means base only)")
    return order, starts


def _batch(c, like, max_rank: int, way):
    from ...kernels.multi import batch

    dropout = getattr(c, "dropout_p", None), getattr(c, "seed", None)
    vectors = [v.contiguous() for v in c.vectors or ()], frozenset(c.acting.split())
    adapters = batch.Adapters(c.weights, c.table, c.scaling, max_rank, c.order, c.starts, *dropout, *vectors)
    return adapters, batch.batch(adapters, like, kernel_settings(like, way))


def _onto(c, columns: int, N: int, K: int):
    from ...kernels.multi.multi_lora_linear import Onto

    return Onto(columns, weight_of(c.kind, c.base, N, K), c.kind == "identity")


def multi_lora_linear_fwd(c, way):
    """(y, u, h), see ``peftkern.ops.multi_lora_linear``."""
    from ...kernels.multi import multi_lora_linear as kernels

    with on_device(c.x):
        _, batch = _batch(c, c.x, c.max_rank, way)
        N = c.out_features
        return kernels.forward(batch, c.x, _onto(c, N, N, c.x.shape[1]), c.bias, c.save_base)


def multi_lora_linear_bwd(c, way):
    """(dx, dbias, gradients like weights, gradients like vectors), see ``peftkern.ops.multi_lora_linear``."""
    from ...kernels.multi import multi_lora_linear as kernels

    with on_device(c.dy):
        adapters, batch = _batch(c, c.dy, c.u.shape[1], way)
        kept, K = kernels.Kept(c.x, c.u, c.h), c.in_features
        wanted = kernels.Wanted(c.need_x, c.need_bias, c.need, c.wants_vectors)
        return kernels.backward(batch, adapters, c.dy, kept, wanted, _onto(c, K, c.dy.shape[1], K))


def sgmv_add(c, way):
    """Adds the branch to ``out``, see ``peftkern.ops.sgmv``."""
    from ...kernels.multi import multi_lora_linear as kernels

    with on_device(c.x):
        kernels.add(_batch(c, c.x, c.max_rank, way)[1], c.out, c.x)


OPS = {
    "multi_lora_linear_route": multi_lora_linear_route,
    "multi_lora_linear_fwd": multi_lora_linear_fwd,
    "multi_lora_linear_bwd": multi_lora_linear_bwd,
    "sgmv_add": sgmv_add,
}

"""multi_lora_linear on Triton: the ops' arguments as a batch, on the device and stream of the call."""

from __future__ import annotations

from .device import kernel_settings, on_device


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
    from ...kernels.multi import multi_lora_linear as kernels

    dropout = getattr(c, "dropout_p", None), getattr(c, "seed", None)
    adapters = kernels.Adapters(c.weights, c.table, c.scaling, max_rank, c.order, c.starts, *dropout)
    return kernels.batch(adapters, like, kernel_settings(like, way))


def _onto(c, columns: int):
    from ...kernels.multi.multi_lora_linear import Onto

    return Onto(columns, c.base[0] if c.base else None, c.kind == "identity")


def multi_lora_linear_fwd(c, way):
    """(y, u), see ``peftkern.ops.multi_lora_linear``."""
    from ...kernels.multi import multi_lora_linear as kernels

    with on_device(c.x):
        return kernels.forward(_batch(c, c.x, c.max_rank, way), c.x, _onto(c, c.out_features), c.bias)


def multi_lora_linear_bwd(c, way):
    """(dx, dbias, gradients like weights), see ``peftkern.ops.multi_lora_linear``."""
    from ...kernels.multi import multi_lora_linear as kernels

    with on_device(c.dy):
        batch = _batch(c, c.dy, c.u.shape[1], way)
        du, dbias, grads = kernels.backward_adapter(batch, c.dy, c.x, c.u, c.weights, c.need, c.need_bias)
        dx = kernels.backward_input(batch, c.dy, du, _onto(c, c.in_features)) if c.need_x else c.dy.new_empty(0)
    return dx, dbias, grads


def sgmv_add(c, way):
    """Adds the branch to ``out``, see ``peftkern.ops.sgmv``."""
    from ...kernels.multi import multi_lora_linear as kernels

    with on_device(c.x):
        kernels.add(_batch(c, c.x, c.max_rank, way), c.out, c.x)


OPS = {
    "multi_lora_linear_route": multi_lora_linear_route,
    "multi_lora_linear_fwd": multi_lora_linear_fwd,
    "multi_lora_linear_bwd": multi_lora_linear_bwd,
    "sgmv_add": sgmv_add,
}

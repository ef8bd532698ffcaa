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


def _batch(c, like, max_rank: int, dropout_p, seed, way):
    from ...kernels.multi.multi_lora_linear import batch

    return batch(
        c.weights, like, c.table, c.scaling, c.order, c.starts, max_rank, dropout_p, seed, kernel_settings(like, way)
    )  # fmt: skip


def multi_lora_linear_fwd(c, way):
    """(y, u), see ``peftkern.ops.multi_lora_linear``."""
    from ...kernels.multi.multi_lora_linear import forward

    with on_device(c.x):
        batch = _batch(c, c.x, c.max_rank, c.dropout_p, c.seed, way)
        return forward(batch, c.x, c.base[0] if c.base else None, c.out_features, c.bias)


def multi_lora_linear_bwd(c, way):
    """(dx, dbias, gradients like weights), see ``peftkern.ops.multi_lora_linear``."""
    from ...kernels.multi.multi_lora_linear import backward_adapter, backward_input

    with on_device(c.dy):
        batch = _batch(c, c.dy, c.u.shape[1], c.dropout_p, c.seed, way)
        du, dbias, grads = backward_adapter(batch, c.dy, c.x, c.u, c.weights, c.need, c.need_bias)
        dx = c.dy.new_empty(0)
        if c.need_x:
            dx = backward_input(batch, c.dy, du, c.base[0] if c.base else None, c.in_features)
    return dx, dbias, grads


def sgmv_add(c, way):
    """Adds the branch to ``out``, see ``peftkern.ops.sgmv``."""
    from ...kernels.multi.multi_lora_linear import add

    with on_device(c.x):
        add(_batch(c, c.x, c.max_rank, None, None, way), c.out, c.x)


OPS = {
    "multi_lora_linear_route": multi_lora_linear_route,
    "multi_lora_linear_fwd": multi_lora_linear_fwd,
    "multi_lora_linear_bwd": multi_lora_linear_bwd,
    "sgmv_add": sgmv_add,
}

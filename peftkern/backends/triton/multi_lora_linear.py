"""multi_lora_linear on Triton: the ops' arguments as a batch, on the device and stream of the call."""

from __future__ import annotations

from .device import kernel_settings, on_device


def multi_lora_linear_route(ids, table, mask, *, way):
    """(order, starts), see ``peftkern.ops.multi_lora_linear``."""
    from ...kernels.multi.route import route

    with on_device(ids):
        order, starts = route(ids, table, mask)
    # Only where it makes nobody wait: in the interpreter, on CPU tensors.
    if ids.device.type == "cpu" and starts[table.shape[0] + 1] < ids.numel():
        bad = ids.reshape(-1)[order[starts[table.shape[0] + 1]].long()].item()
        raise ValueError(
            f"adapter_ids holds {bad}, which is no adapter of the {table.shape[0]} here (-1 means base only)"
        )
    return order, starts


def _batch(like, weights, table, scaling, order, starts, max_rank, dropout_p, seed, way):
    from ...kernels.multi.multi_lora_linear import batch

    return batch(weights, like, table, scaling, order, starts, max_rank, dropout_p, seed, kernel_settings(like, way))


def multi_lora_linear_fwd(
    x, weight, out_features, bias, weights, table, scaling, max_rank, order, starts, dropout_p, seed, *, way
):
    """(y, u), see ``peftkern.ops.multi_lora_linear``."""
    from ...kernels.multi.multi_lora_linear import forward

    with on_device(x):
        batch = _batch(x, weights, table, scaling, order, starts, max_rank, dropout_p, seed, way)
        return forward(batch, x, weight, out_features, bias)


def multi_lora_linear_bwd_adapter(
    dy, x, u, weights, table, scaling, order, starts, dropout_p, seed, need, need_bias, *, way
):
    """(du, dbias, gradients like weights), see ``peftkern.ops.multi_lora_linear``."""
    from ...kernels.multi.multi_lora_linear import backward_adapter

    with on_device(dy):
        batch = _batch(dy, weights, table, scaling, order, starts, u.shape[1], dropout_p, seed, way)
        return backward_adapter(batch, dy, x, u, weights, need, need_bias)


def multi_lora_linear_bwd_input(dy, du, weight, in_features, weights, table, order, starts, dropout_p, seed, *, way):
    """dx, see ``peftkern.ops.multi_lora_linear``."""
    from ...kernels.multi.multi_lora_linear import backward_input

    with on_device(dy):
        batch = _batch(dy, weights, table, None, order, starts, du.shape[1], dropout_p, seed, way)
        return backward_input(batch, dy, du, weight, in_features)


def sgmv_add(out, x, weights, table, scaling, max_rank, order, starts, *, way):
    """Adds the branch to ``out``, see ``peftkern.ops.sgmv``."""
    from ...kernels.multi.multi_lora_linear import add

    with on_device(x):
        add(_batch(x, weights, table, scaling, order, starts, max_rank, None, None, way), out, x)


OPS = {
    "multi_lora_linear_route": multi_lora_linear_route,
    "multi_lora_linear_fwd": multi_lora_linear_fwd,
    "multi_lora_linear_bwd_adapter": multi_lora_linear_bwd_adapter,
    "multi_lora_linear_bwd_input": multi_lora_linear_bwd_input,
    "sgmv_add": sgmv_add,
}

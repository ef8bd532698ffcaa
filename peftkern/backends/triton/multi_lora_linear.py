"""multi_lora_linear on Triton: the ops' arguments as a batch, on the device and stream of the call."""

from __future__ import annotations

from .device import kernel_settings, on_device


def multi_lora_linear_route(ids, table, mask):
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


def multi_lora_linear_fwd(
    x, weight, out_features, bias, weights, table, scaling, max_rank, order, starts, dropout_p, seed
):
    """(y, u), see ``peftkern.ops.multi_lora_linear``."""
    from ...kernels.multi import multi_lora_linear as kernels

    adapters = kernels.Adapters(weights, table, scaling, max_rank, order, starts, dropout_p, seed)
    with on_device(x):
        batch = kernels.batch(adapters, x, kernel_settings(x))
        return kernels.forward(batch, x, kernels.Onto(out_features, weight), bias)


def multi_lora_linear_bwd_adapter(dy, x, u, weights, table, scaling, order, starts, dropout_p, seed, need, need_bias):
    """(du, dbias, gradients like weights), see ``peftkern.ops.multi_lora_linear``."""
    from ...kernels.multi import multi_lora_linear as kernels

    adapters = kernels.Adapters(weights, table, scaling, u.shape[1], order, starts, dropout_p, seed)
    with on_device(dy):
        batch = kernels.batch(adapters, dy, kernel_settings(dy))
        return kernels.backward_adapter(batch, dy, x, u, weights, need, need_bias)


def multi_lora_linear_bwd_input(dy, du, weight, in_features, weights, table, order, starts, dropout_p, seed):
    """dx, see ``peftkern.ops.multi_lora_linear``."""
    from ...kernels.multi import multi_lora_linear as kernels

    adapters = kernels.Adapters(weights, table, None, du.shape[1], order, starts, dropout_p, seed)
    with on_device(dy):
        batch = kernels.batch(adapters, dy, kernel_settings(dy))
        return kernels.backward_input(batch, dy, du, kernels.Onto(in_features, weight))


def sgmv_add(out, x, weights, table, scaling, max_rank, order, starts):
    """Adds the branch to ``out``, see ``peftkern.ops.sgmv``."""
    from ...kernels.multi import multi_lora_linear as kernels

    adapters = kernels.Adapters(weights, table, scaling, max_rank, order, starts)
    with on_device(x):
        kernels.add(kernels.batch(adapters, x, kernel_settings(x)), out, x)


OPS = {
    "multi_lora_linear_route": multi_lora_linear_route,
    "multi_lora_linear_fwd": multi_lora_linear_fwd,
    "multi_lora_linear_bwd_adapter": multi_lora_linear_bwd_adapter,
    "multi_lora_linear_bwd_input": multi_lora_linear_bwd_input,
    "sgmv_add": sgmv_add,
}

"""lora_linear on Triton: the ops' arguments as launches, on the device and stream of the call."""

from __future__ import annotations

from .device import kernel_settings, on_device


def lora_linear_fwd(c, way):
    """(y, u, h), see ``peftkern.ops.lora_linear``."""
    from ...kernels import lora_linear as kernels

    with on_device(c.x):
        return kernels.forward(
            c.x, c.base[0], c.lora_A, c.lora_B, c.bias, c.scaling, kernels.dropout(c.dropout_p, c.seed), *c.scales,
            c.save_base, kernel_settings(c.x, way),
        )  # fmt: skip


def lora_linear_bwd(c, way):
    """(dx, dA, dB, dbias, vectors' gradients), see ``peftkern.ops.lora_linear``."""
    from ...kernels import lora_linear as kernels
    from ...kernels.lora_linear_grad import Needs, backward_adapter

    d, p_b, p_d, g_b, g_d = c.scales
    need, dropout = c.need, kernels.dropout(c.dropout_p, c.seed)
    with on_device(c.dy):
        du, dA, dB, dbias, dd, dp_d, dg_b, dg_d = backward_adapter(
            c.dy, c.x, c.u, c.h, c.lora_A, c.lora_B, c.scaling, dropout, d, p_d, g_d,
            Needs(need.A, need.B, need.bias, need.d, need.p_d, need.g_b, need.g_d), kernel_settings(c.dy, way),
        )  # fmt: skip
        dx, dp_b = c.dy.new_empty(0), c.u.new_empty(0)
        if need.x or need.p_b:
            dx, dp_b = kernels.backward_input(
                c.dy, du, c.x, c.base[0], c.lora_A, dropout, p_b, p_d, g_b, need.p_b, kernel_settings(c.dy, way)
            )  # fmt: skip
    return dx, dA, dB, dbias, [dd, dp_b, dp_d, dg_b, dg_d]


OPS = {"lora_linear_fwd": lora_linear_fwd, "lora_linear_bwd": lora_linear_bwd}

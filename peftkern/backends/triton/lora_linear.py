"""lora_linear on Triton: the ops' arguments as launches, on the device and stream of the call."""

from __future__ import annotations

from .device import kernel_settings, on_device


def lora_linear_fwd(c, measured=None):
    """(y, u, h), see ``peftkern.ops.lora_linear``; ``measured``: what is known to be fastest."""
    from ...kernels import lora_linear as kernels

    with on_device(c.x):
        return kernels.forward(
            c.x, c.base[0], c.lora_A, c.lora_B, c.bias, c.scaling, kernels.dropout(c.dropout_p, c.seed), *c.scales,
            c.save_base, kernel_settings(c.x, measured),
        )  # fmt: skip


def lora_linear_bwd(c, measured=None):
    """(dx, dA, dB, dbias, vectors' gradients), see ``peftkern.ops.lora_linear``; ``measured``: as above, for dx."""
    from ...kernels import lora_linear as kernels
    from ...kernels.lora_linear_grad import Needs, backward_adapter

    d, p_b, p_d, g_b, g_d = c.scales
    need, dropout = c.need, kernels.dropout(c.dropout_p, c.seed)
    with on_device(c.dy):
        du, dA, dB, dbias, dd, dp_d, dg_b, dg_d = backward_adapter(
            c.dy, c.x, c.u, c.h, c.lora_A, c.lora_B, c.scaling, dropout, d, p_d, g_d,
            Needs(need.A, need.B, need.bias, need.d, need.p_d, need.g_b, need.g_d), kernel_settings(c.dy),
        )  # fmt: skip
        dx, dp_b = c.dy.new_empty(0), c.u.new_empty(0)
        if need.x or need.p_b:
            dx, dp_b = kernels.backward_input(
                c.dy, du, c.x, c.base[0], c.lora_A, dropout, p_b, p_d, g_b, need.p_b, kernel_settings(c.dy, measured)
            )  # fmt: skip
            dx = dx if need.x else c.dy.new_empty(0)
    return dx, dA, dB, dbias, [dd, dp_b, dp_d, dg_b, dg_d]


OPS = {"lora_linear_fwd": lora_linear_fwd, "lora_linear_bwd": lora_linear_bwd}

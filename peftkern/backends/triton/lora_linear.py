"""lora_linear on Triton: the ops' arguments as launches, on the device and stream of the call."""

from __future__ import annotations

from .device import kernel_settings, on_device


def lora_linear_fwd(
    x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed,
    rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale, save_base, measured=None,
):  # fmt: skip
    """(y, u, h), see ``peftkern.ops.lora_linear``; ``measured``: what is known to be fastest."""
    from ...kernels import lora_linear as kernels

    with on_device(x):
        return kernels.forward(
            x, weight, lora_A, lora_B, bias, scaling, kernels.dropout(dropout_p, seed),
            rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale, save_base,
            kernel_settings(x, measured),
        )  # fmt: skip


def lora_linear_bwd_adapter(
    dy, x, u, h, lora_A, lora_B, scaling, dropout_p, seed, rank_scale, delta_in_scale, delta_out_scale,
    need_A, need_B, need_bias, need_rank_scale, need_delta_in, need_base_out, need_delta_out,
):  # fmt: skip
    """(du, dA, dB, dbias, drank_scale, ddelta_in, dbase_out, ddelta_out), see ``peftkern.ops.lora_linear``."""
    from ...kernels import lora_linear as kernels
    from ...kernels.lora_linear_grad import Needs, backward_adapter

    needs = Needs(need_A, need_B, need_bias, need_rank_scale, need_delta_in, need_base_out, need_delta_out)
    with on_device(dy):
        return backward_adapter(
            dy, x, u, h, lora_A, lora_B, scaling, kernels.dropout(dropout_p, seed),
            rank_scale, delta_in_scale, delta_out_scale, needs, kernel_settings(dy),
        )  # fmt: skip


def lora_linear_bwd_input(
    dy, du, x, weight, lora_A, dropout_p, seed, base_in_scale, delta_in_scale, base_out_scale, need_base_in,
    measured=None,
):  # fmt: skip
    """(dx, dbase_in), see ``peftkern.ops.lora_linear``; ``measured``: what is known to be fastest."""
    from ...kernels import lora_linear as kernels

    with on_device(dy):
        return kernels.backward_input(
            dy, du, x, weight, lora_A, kernels.dropout(dropout_p, seed),
            base_in_scale, delta_in_scale, base_out_scale, need_base_in, kernel_settings(dy, measured),
        )  # fmt: skip


OPS = {
    "lora_linear_fwd": lora_linear_fwd,
    "lora_linear_bwd_adapter": lora_linear_bwd_adapter,
    "lora_linear_bwd_input": lora_linear_bwd_input,
}

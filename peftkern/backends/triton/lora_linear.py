"""lora_linear on Triton: the ops' arguments as launches, on the device and stream of the call."""

from __future__ import annotations

from .device import kernel_settings, on_device


def lora_linear_fwd(
    x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed,
    rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale, save_base, measured=None,
):  # fmt: skip
    """(y, u, h), see ``peftkern.ops.lora_linear``; ``measured``: what is known to be fastest."""
    from ...kernels import call
    from ...kernels.lora_linear import forward

    scales = call.Scales(rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale)
    with on_device(x):
        dropout = call.Dropout(dropout_p, seed)
        given = call.Forward(x, weight, lora_A, lora_B, bias, scaling, dropout, scales, save_base)
        return forward(given, kernel_settings(x, measured))


def lora_linear_bwd_adapter(
    dy, x, u, h, lora_A, lora_B, scaling, dropout_p, seed, rank_scale, delta_in_scale, delta_out_scale,
    need_A, need_B, need_bias, need_rank_scale, need_delta_in, need_base_out, need_delta_out,
):  # fmt: skip
    """(du, dA, dB, dbias, drank_scale, ddelta_in, dbase_out, ddelta_out), see ``peftkern.ops.lora_linear``."""
    from ...kernels import call
    from ...kernels.lora_linear_grad import backward_adapter

    scales = call.Scales(rank_scale, None, delta_in_scale, None, delta_out_scale)
    needs = call.Needs(
        True, need_A, need_B, need_bias, need_rank_scale, False, need_delta_in, need_base_out, need_delta_out
    )
    with on_device(dy):
        dropout = call.Dropout(dropout_p, seed)
        given = call.Backward(dy, x, u, h, None, lora_A, lora_B, scaling, dropout, scales, needs)
        du, dA, dB, dbias, (dd, _, dp_d, dg_b, dg_d) = backward_adapter(given, kernel_settings(dy))
    return du, dA, dB, dbias, dd, dp_d, dg_b, dg_d


def lora_linear_bwd_input(
    dy, du, x, weight, lora_A, dropout_p, seed, base_in_scale, delta_in_scale, base_out_scale, need_base_in,
    measured=None,
):  # fmt: skip
    """(dx, dbase_in), see ``peftkern.ops.lora_linear``; ``measured``: what is known to be fastest."""
    from ...kernels import call
    from ...kernels.lora_linear_grad import backward_input

    scales = call.Scales(None, base_in_scale, delta_in_scale, base_out_scale, None)
    needs = call.Needs(x=True, p_b=need_base_in)
    with on_device(dy):
        dropout = call.Dropout(dropout_p, seed)
        given = call.Backward(dy, x, du, None, weight, lora_A, lora_A, 1.0, dropout, scales, needs)
        return backward_input(given, du, kernel_settings(dy, measured))


OPS = {
    "lora_linear_fwd": lora_linear_fwd,
    "lora_linear_bwd_adapter": lora_linear_bwd_adapter,
    "lora_linear_bwd_input": lora_linear_bwd_input,
}

"""lora_linear on Triton: the ops' arguments as launches, on the device and stream of the call."""

from __future__ import annotations

from .device import kernel_settings, on_device
from .operand import weight_of


def _weight(c):
    return weight_of(c.kind, c.base, c.lora_B.shape[0], c.lora_A.shape[1])


def lora_linear_fwd(c, way):
    """(y, u, h), see ``peftkern.ops.lora_linear``."""
    from ...kernels import call
    from ...kernels.lora_linear import forward

    given = call.Forward(
        c.x, _weight(c), c.lora_A, c.lora_B, c.bias, c.scaling, call.Dropout(c.dropout_p, c.seed),
        call.Scales(*c.scales), c.save_base,
    )  # fmt: skip
    with on_device(c.x):
        return forward(given, kernel_settings(c.x, way))


def lora_linear_bwd(c, way):
    """(dx, dA, dB, dbias, vectors' gradients), see ``peftkern.ops.lora_linear``."""
    from ...kernels import call
    from ...kernels.lora_linear_grad import backward

    given = call.Backward(
        c.dy, c.x, c.u, c.h, _weight(c), c.lora_A, c.lora_B, c.scaling,
        call.Dropout(c.dropout_p, c.seed), call.Scales(*c.scales), call.Needs(*c.needs),
    )  # fmt: skip
    with on_device(c.dy):
        return backward(given, kernel_settings(c.dy, way))


OPS = {"lora_linear_fwd": lora_linear_fwd, "lora_linear_bwd": lora_linear_bwd}

"""lora_row_norm on Triton: the op's arguments as launches, on the device and stream of the call."""

from __future__ import annotations

from .device import kernel_settings, on_device
from .operand import weight_of


def lora_row_norm(c, way):
    """fp32 (N,), see ``peftkern.ops.lora_row_norm``."""
    from ...kernels.lora_row_norm import row_norm

    weight = weight_of(c.kind, c.base, c.lora_B.shape[0], c.lora_A.shape[1])
    with on_device(c.lora_A):
        return row_norm(weight, c.lora_A, c.lora_B, c.scaling, kernel_settings(c.lora_A, way))


OPS = {"lora_row_norm": lora_row_norm}

"""lora_row_norm on CPU: one native call, which reads W once (csrc/cpu/lora/row_norm.cpp)."""

from __future__ import annotations

import torch

from . import call


def lora_row_norm(c, way):
    """fp32 (N,), see ``peftkern.ops.lora_row_norm``."""
    args = torch.get_num_threads(), c.kind, call.weight_of(c.base), c.lora_A, c.lora_B, c.scaling
    return call.answered(call.row_norm, call.nothing, args)


OPS = {"lora_row_norm": lora_row_norm}

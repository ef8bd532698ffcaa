"""The row norms of W + s B A, which DoRA takes as constants: no gradient, and nothing is saved."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bases.base import Base, base_of
from ..dispatch.registry import caller

_norm = caller("lora_row_norm")


def row_norm(weight: Tensor | Base, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """|W + s B A| of each row, (N), in fp32 (fp64 for fp64), from one read of W; see peftkern/ops/lora_row_norm.py.

    weight (N, K) or a base, lora_A (R, K), lora_B (N, R); scaling s, a float or a one-element tensor, which the host does
    not read. Raises ValueError, TypeError for what does not fit.
    """
    base = base_of(weight)
    with torch.no_grad():
        if isinstance(scaling, Tensor):
            lora_B, scaling = (lora_B * scaling).to(lora_B.dtype), 1.0
        return _norm(list(base.tensors), base.kind, lora_A, lora_B, float(scaling))

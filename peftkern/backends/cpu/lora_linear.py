"""lora_linear on CPU: one native call a pass (csrc/cpu/lora/linear.h), with the base product by whoever is fastest.

Forward: one pass over x gives u; the base product's epilogue adds branch, scales and bias to each block it completes.
Backward: one pass over dy gives du, the gradient of B and the bias gradient; one pass over x gives the gradient of A;
the input gradient is the forward pattern with W and A. Dropout is drawn again from the seed wherever it acts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import call
from .call import weight_of


def _scales(c) -> tuple[Tensor | None, ...] | None:
    return None if all(t is None for t in c.scales) else tuple(c.scales)


def lora_linear_fwd(c, way):
    """(y, u, h); see peftkern.ops.lora_linear."""
    args = (
        way.now, torch.get_num_threads(), c.x, c.kind, weight_of(c.base), c.lora_A, c.lora_B, c.bias, c.scaling, c.dropout_p,
        c.seed, _scales(c), True, c.save_base,
    )  # fmt: skip
    y, u, h = call.answered(call.forward, call.learn_forward, args, call.kind_of(c, way), way.pairs)
    return y, u, c.x.new_empty(0) if h is None else h


def lora_linear_bwd(c, way):
    """(dx, dA, dB, dbias, vectors' gradients); see peftkern.ops.lora_linear."""
    need, (R, K) = c.need, c.lora_A.shape
    dx = need.x or need.p_b
    x, h = c.x if need.A or need.p_d or need.p_b else None, c.h if need.g_b else None
    args = (
        way.now, torch.get_num_threads(), c.dy, x, c.u, h, c.kind, weight_of(c.base) if dx else None, c.lora_A, c.lora_B,
        c.scaling, c.dropout_p, c.seed, _scales(c), sum(1 << i for i, n in enumerate(need) if n), K, R, c.lora_A.dtype,
    )  # fmt: skip
    kind = call.kind_of(c, way) if dx else "vendor"
    dx, dA, dB, *sums = call.answered(call.backward, call.learn_backward, args, kind, way.pairs)
    dbias, *vectors = (c.u.new_empty(0) if t is None else t for t in sums)
    dx, dA, dB = (like.new_empty(0) if t is None else t for t, like in ((dx, c.dy), (dA, c.lora_A), (dB, c.lora_B)))
    return dx, dA, dB, dbias, vectors


OPS = {"lora_linear_fwd": lora_linear_fwd, "lora_linear_bwd": lora_linear_bwd}

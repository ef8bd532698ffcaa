"""bottleneck_adapter on CPU: one native call a pass (csrc/cpu/bottleneck), its products in fp32 or, where that is faster, bf16.

Forward: a pass over h gives t; another adds the branch to the residual. Backward: a pass over dy gives dv and what up's
gradients are made of; one over h gives down's, and one adds dt D to dy. Dropout is drawn again from the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...activations import CODES
from . import call


def bottleneck_adapter_fwd(c, way) -> tuple[Tensor, Tensor]:
    """(y, t); see peftkern.ops.bottleneck_adapter."""
    return call.answered(
        call.bottleneck_forward, call.learn_bottleneck_forward,
        (
            way.now, torch.get_num_threads(), c.h, c.residual, c.down, c.up, c.down_bias, c.up_bias, c.gate, c.out_scale,
            CODES[c.activation], c.scaling, c.dropout_p, c.on_input, c.seed, True,
        ),
        way.kind,
    )  # fmt: skip


def bottleneck_adapter_bwd(c, way) -> tuple[Tensor, ...]:
    """(dh, ddown, dup, ddown_bias, dup_bias, dgate, dout_scale); see peftkern.ops.bottleneck_adapter."""
    needs = sum(1 << i for i, need in enumerate(c.needs) if need)
    done = call.answered(
        call.bottleneck_backward, call.learn_bottleneck_backward,
        (
            way.now, torch.get_num_threads(), c.dy, c.h if c.need.down else None, c.t, c.down, c.up, c.up_bias, c.gate,
            c.out_scale, CODES[c.activation], c.scaling, c.dropout_p, c.on_input, c.seed, c.through, needs,
            c.down.shape[1], c.down.shape[0], c.down.dtype,
        ),
        way.kind,
    )  # fmt: skip
    like = (c.dy, c.down, c.up, c.t, c.t, c.t, c.t)
    return tuple(t.new_empty(0) if grad is None else grad for grad, t in zip(done, like))


OPS = {"bottleneck_adapter_fwd": bottleneck_adapter_fwd, "bottleneck_adapter_bwd": bottleneck_adapter_bwd}

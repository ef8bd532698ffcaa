"""bottleneck_adapter on CUDA: one native call a pass, which starts all its kernels (csrc/cuda/bottleneck/bottleneck.h).

Sums over what is small, (M, R) or (N, R), are torch's.
"""

from __future__ import annotations

from torch import Tensor

from ...activations import CODES
from ...problem import Problem
from ...settings import Settings
from . import native
from .native import rows, vectors


def decline(problem: Problem, now: Settings) -> str | None:
    """Why no kernel here can take the problem."""
    if problem.dtype not in native.HALVES:
        return f"has kernels for bfloat16 and float16, not {problem.dtype}"
    if problem.R > 512 or max(problem.M, problem.N, problem.K) >= 2**31:
        return "R is over 512, or a size is 2^31 or more"
    return None


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _shared(c) -> tuple:
    # What both native calls take of the matrices on.
    return (
        c.down, c.up, _contiguous(c.up_bias), *vectors((c.gate, c.out_scale)), CODES[c.activation], c.scaling, c.dropout_p,
        c.on_input, c.seed,
    )  # fmt: skip


def bottleneck_adapter_fwd(c) -> tuple[Tensor, Tensor]:
    """(y, t), see ``peftkern.ops.bottleneck_adapter``."""
    with native.on_device(c.h):
        h = rows(c.h)
        residual = h if c.residual is None else rows(c.residual)
        return native.start(native._C.cuda_bottleneck_forward, c.h, h, residual, _contiguous(c.down_bias), *_shared(c))


def bottleneck_adapter_bwd(c) -> tuple[Tensor, ...]:
    """(dh, ddown, dup, ddown_bias, dup_bias, dgate, dout_scale), see ``peftkern.ops.bottleneck_adapter``."""
    need, empty = c.need, c.t.new_empty(0)
    wants_sums = need.up_bias or (need.out_scale and c.up_bias is not None)
    with native.on_device(c.dy):
        shared = _shared(c)
        gate, scale = shared[3:5]
        weights = None
        if wants_sums and (gate is not None or (c.dropout_p > 0.0 and not c.on_input)):
            weights = c.t.new_ones(c.t.shape[0]) if gate is None else gate
        dh, dD, dU, dt, sums, dg = native.start(
            native._C.cuda_bottleneck_backward, c.dy, rows(c.dy), rows(c.h) if need.down else None, c.t.contiguous(),
            weights, *shared, c.through, need.out_scale, need.h, need.down, need.up or need.out_scale, need.down_bias,
            wants_sums, need.gate,
        )  # fmt: skip
        S = None if sums is None else sums * c.scaling
        dc = empty
        if need.out_scale:
            dc = (c.up * dU).sum(1) if S is None else (c.up * dU).sum(1) + c.up_bias * S
            if scale is not None:
                dU = dU * scale[:, None]
            dU = dU.to(c.up.dtype) if need.up else None
        db_up = empty if not need.up_bias else S if scale is None else S * scale
        db_down = dt.sum(0) if need.down_bias else empty
    likes = (c.dy, dh), (c.down, dD), (c.up, dU), (c.t, db_down), (c.t, db_up), (c.t, dg), (c.t, dc)
    return tuple(like.new_empty(0) if t is None else t for like, t in likes)


OPS = {"bottleneck_adapter_fwd": bottleneck_adapter_fwd, "bottleneck_adapter_bwd": bottleneck_adapter_bwd}

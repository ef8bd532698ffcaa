"""bottleneck_adapter: two small products around an activation, added to the residual stream.

    y = residual + g * drop_out(s * c * (z U^T + b_up)),        z = f(t),  t = drop_in(h) D^T + b_down

    h (M, K)   D down (R, K)   U up (N, R)   b_down (R)   b_up (N)   s scaling   f activation
    g gate (M), of each row   c out_scale (N)   residual (M, N), or h itself   dropout acts on the input or on the output

and its gradients, for the output gradient dy, with e = drop_out'(dy), H = (g e)^T z and S = sum_m g e:

    dv = s (c * e) U           dt = g dv * f'(t)
    dh = drop_in'(dt D)  (+ dy if h is the residual)            dresidual = dy
    dD = dt^T drop_in(h)       db_down = sum_m dt
    dU = s c[:, None] * H      db_up = s c * S
    dg = rowdot(dv, z) + s e (c * b_up)                         dc = s (rowdot(U, H) + b_up * S)

Of M x N or M x K nothing is kept but h; t (M, R) in fp32 is what backward reads of the forward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..checks import accumulate_dtype, check_fits, check_number, check_rows, check_tensor
from ..dispatch.registry import define
from ..problem import Problem, problem_like
from .dropout_mask import check_p, check_seed
from .reference import dropped, times


class Bottleneck(NamedTuple):
    """Arguments of ``bottleneck_adapter_fwd`` -> (y (M, N) in h's dtype, t (M, R) in fp32, or fp64 for fp64).

    ``residual``: None for h itself. ``activation``: a name in peftkern/activations.py. ``on_input``: dropout acts on h,
    otherwise on what is added. Vectors and matrices in fp32 or h's dtype, down and up alike.
    """

    h: Tensor
    residual: Tensor | None
    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    gate: Tensor | None
    out_scale: Tensor | None
    activation: str
    scaling: float
    dropout_p: float
    on_input: bool
    seed: Tensor | None


class BottleneckGrad(NamedTuple):
    """Arguments of ``bottleneck_adapter_bwd`` -> (dh, ddown, dup, ddown_bias, dup_bias, dgate, dout_scale).

    ``needs``: as ``BottleneckNeeds``; what is not needed comes back empty. ``through``: h was the residual, so dh includes
    dy. dh in dy's dtype, ddown and dup in the matrices', the others in fp32 (fp64 for fp64). h is read for ddown alone.
    """

    dy: Tensor
    h: Tensor | None
    t: Tensor
    down: Tensor
    up: Tensor
    up_bias: Tensor | None
    gate: Tensor | None
    out_scale: Tensor | None
    activation: str
    scaling: float
    dropout_p: float
    on_input: bool
    seed: Tensor | None
    through: bool
    needs: list[bool]

    @property
    def need(self) -> BottleneckNeeds:
        """The needed gradients by name."""
        return BottleneckNeeds(*self.needs)


class BottleneckNeeds(NamedTuple):
    """Which gradients a backward pass is to compute."""

    h: bool
    down: bool
    up: bool
    down_bias: bool = False
    up_bias: bool = False
    gate: bool = False
    out_scale: bool = False


def _shares(c: Bottleneck | BottleneckGrad) -> tuple[float, float]:
    # dropout of the input and of the output
    return (c.dropout_p, 0.0) if c.on_input else (0.0, c.dropout_p)


def bottleneck_adapter_fwd_ref(c: Bottleneck) -> tuple[Tensor, Tensor]:
    """(y, t); see ``Bottleneck``."""
    acc, (p_in, p_out) = accumulate_dtype(c.h.dtype), _shares(c)
    hf = c.h.to(acc)
    t = dropped(hf, p_in, c.seed) @ c.down.to(acc).t()
    if c.down_bias is not None:
        t = t + c.down_bias.to(acc)
    o = ACTIVATIONS[c.activation].value(t) @ c.up.to(acc).t()
    if c.up_bias is not None:
        o = o + c.up_bias.to(acc)
    o = dropped(times(o * c.scaling, c.out_scale), p_out, c.seed)
    if c.gate is not None:
        o = o * c.gate.to(acc)[:, None]
    residual = hf if c.residual is None else c.residual.to(acc)
    return (residual + o).to(c.h.dtype), t


def bottleneck_adapter_bwd_ref(c: BottleneckGrad) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dh, ddown, dup, ddown_bias, dup_bias, dgate, dout_scale); see ``BottleneckGrad``."""
    acc, need, (p_in, p_out) = accumulate_dtype(c.dy.dtype), c.need, _shares(c)
    D, U, f = c.down.to(acc), c.up.to(acc), ACTIVATIONS[c.activation]
    dh, dD, dU = c.dy.new_empty(0), c.down.new_empty(0), c.up.new_empty(0)
    db_down, db_up, dg, dc = (c.t.new_empty(0) for _ in range(4))
    dyf = c.dy.to(acc)
    e, z = dropped(dyf, p_out, c.seed), f.value(c.t)
    dv = (times(e, c.out_scale) @ U) * c.scaling
    if need.gate:
        dg = (dv * z).sum(1)
        if c.up_bias is not None:
            dg = dg + (e @ times(c.up_bias.to(acc), c.out_scale)) * c.scaling
    if need.h or need.down or need.down_bias:
        dt = dv * f.slope(c.t)
        dt = dt if c.gate is None else dt * c.gate.to(acc)[:, None]
        if need.h:
            dh = dropped(dt @ D, p_in, c.seed)
            dh = (dh + dyf if c.through else dh).to(c.dy.dtype)
        if need.down:
            dD = (dt.t() @ dropped(c.h.to(acc), p_in, c.seed)).to(c.down.dtype)
        if need.down_bias:
            db_down = dt.sum(0)
    if need.up or need.up_bias or need.out_scale:
        ge = e if c.gate is None else e * c.gate.to(acc)[:, None]
        H, S = (ge.t() @ z) * c.scaling, ge.sum(0) * c.scaling
        if need.up:
            dU = (H if c.out_scale is None else H * c.out_scale.to(acc)[:, None]).to(c.up.dtype)
        if need.up_bias:
            db_up = times(S, c.out_scale)
        if need.out_scale:
            dc = (U * H).sum(1) if c.up_bias is None else (U * H).sum(1) + c.up_bias.to(acc) * S
    return dh, dD, dU, db_down, db_up, dg, dc


def _check_matrices(c: Bottleneck | BottleneckGrad, like: Tensor, N: int | None, K: int | None) -> tuple[int, int, int]:
    """(N, K, R), if down, up, what stands beside them and the options fit an activation ``like``."""
    for name, value, meaning in (("down", c.down, "(R, K)"), ("up", c.up, "(N, R)")):
        check_tensor(name, value)
        if value.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {meaning}")
    R, N, K = c.down.shape[0], c.up.shape[0] if N is None else N, c.down.shape[1] if K is None else K
    dtypes, device = (like.dtype, torch.float32), like.device
    check_fits("down", c.down, (R, K), "(R, K)", device, dtypes)
    check_fits("up", c.up, (N, R), "(N, R)", device, (c.down.dtype,))
    vectors = {
        "up_bias": (c.up_bias, N, "(N,)"),
        "out_scale": (c.out_scale, N, "(N,)"),
        "gate": (c.gate, like.shape[0], "(M,)"),
    }
    for name, (vector, size, meaning) in vectors.items():
        if vector is not None:
            check_fits(name, vector, (size,), meaning, device, dtypes)
    if c.activation not in ACTIVATIONS:
        raise ValueError(f"activation is {c.activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    check_number("scaling", c.scaling)
    check_p(c.dropout_p)
    if c.dropout_p > 0.0:
        check_seed(c.seed, device)
    return N, K, R


def _options(c: Bottleneck | BottleneckGrad) -> dict:
    drops = c.dropout_p > 0.0
    return {
        "up_bias": c.up_bias, "gate": c.gate, "out_scale": c.out_scale, c.activation: True,
        "dropout_in": drops and c.on_input, "dropout_out": drops and not c.on_input,
    }  # fmt: skip


def _describe(c: Bottleneck) -> Problem:
    M, K = check_rows("h", c.h, letter="K")
    N, _, R = _check_matrices(c, c.h, K if c.residual is None else None, K)
    if c.residual is not None:
        check_fits("residual", c.residual, (M, N), "(M, N)", c.h.device, (c.h.dtype,))
    if c.down_bias is not None:
        check_fits("down_bias", c.down_bias, (R,), "(R,)", c.h.device, (c.h.dtype, torch.float32))
    flags = {**_options(c), "down_bias": c.down_bias, "residual": c.residual}
    return problem_like(c.h, "bottleneck_adapter_fwd", c.down.dtype, (M, N, K, R), flags)


def _describe_grad(c: BottleneckGrad) -> Problem:
    M, N = check_rows("dy", c.dy, letter="N")
    N, K, R = _check_matrices(c, c.dy, N, N if c.through else None)
    check_fits("t", c.t, (M, R), "(M, R)", c.dy.device, (accumulate_dtype(c.dy.dtype),))
    if c.need.down:
        check_fits("h", c.h, (M, K), "(M, K)", c.dy.device, (c.dy.dtype,))
    flags = {**_options(c), **{f"need_{name}": value for name, value in c.need._asdict().items()}, "through": c.through}
    return problem_like(c.dy, "bottleneck_adapter_bwd", c.down.dtype, (M, N, K, R), flags)


def _fake(c: Bottleneck):
    p = _describe(c)
    return c.h.new_empty((p.M, p.N)), c.h.new_empty((p.M, p.R), dtype=accumulate_dtype(p.dtype))


def _fake_grad(c: BottleneckGrad):
    p, need = _describe_grad(c), c.need
    return (
        c.dy.new_empty((p.M, p.K) if need.h else 0),
        c.down.new_empty(c.down.shape if need.down else 0),
        c.up.new_empty(c.up.shape if need.up else 0),
        c.t.new_empty(p.R if need.down_bias else 0),
        c.t.new_empty(p.N if need.up_bias else 0),
        c.t.new_empty(p.M if need.gate else 0),
        c.t.new_empty(p.N if need.out_scale else 0),
    )


def _flops(p: Problem, c: Bottleneck) -> int:
    return 2 * p.M * p.R * (p.K + p.N)


def _flops_grad(p: Problem, c: BottleneckGrad) -> int:
    columns = p.N  # dv
    columns += p.K * (c.need.h + c.need.down)
    columns += p.N if c.need.up or c.need.out_scale else 0
    return 2 * p.M * p.R * columns


define(
    "bottleneck_adapter_fwd", Bottleneck, "(Tensor, Tensor)", reference=bottleneck_adapter_fwd_ref, fake=_fake,
    describe=_describe, flops=_flops,
)  # fmt: skip
define(
    "bottleneck_adapter_bwd", BottleneckGrad, "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=bottleneck_adapter_bwd_ref, fake=_fake_grad, describe=_describe_grad, flops=_flops_grad,
)  # fmt: skip

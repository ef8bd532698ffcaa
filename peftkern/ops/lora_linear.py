"""lora_linear: a frozen base with a low-rank branch, all scales included.

    y = g_b * Base(x * p_b) + s * g_d * ((d * u) B^T) + bias,        u = (drop(x) * p_d) A^T

    x (M, K)   A lora_A (R, K)   B lora_B (N, R)   bias (N)   s scaling   Base(x) = x W^T, W weight (N, K); see bases/
    d (R), p_b (K), p_d (K), g_b (N), g_d (N): the vectors of peftkern/equation.py

and its gradients, for the output gradient dy and H = dy^T (d * u):

    dv = s (g_d * dy) B         du = d * dv
    dx = ((g_b * dy) W) * p_b + drop'((du A) * p_d)
    dA = du^T (drop(x) * p_d)   dB = s g_d[:, None] * H
    dd = sum_t dv * u           dg_d = s rowdot(B, H)        dp_d = coldot(A, du^T drop(x))
    dg_b = sum_t dy * h         dp_b = sum_t ((g_b * dy) W) * x        dbias = sum_t dy

W is frozen: there is no dW. Two ops, ``lora_linear_fwd`` and ``lora_linear_bwd``. This file is the definition; every
back end is tested against it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..bases.base import kind_of, operands
from ..checks import accumulate_dtype, check_adapters, check_fits, check_number, check_rows, check_tensor
from ..dispatch.registry import define
from ..equation import PLACES, Needs, Scales, names
from ..problem import Problem, problem_like
from .dropout_mask import check_p, check_seed
from .reference import dropped, times


class Forward(NamedTuple):
    """Arguments of ``lora_linear_fwd`` -> (y in x.dtype, u without d and s, h = Base(x * p_b) if ``save_base``).

    u is in fp32 (fp64 for fp64), h in x.dtype, empty if not wanted.
    """

    x: Tensor
    base: list[Tensor]
    kind: str
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float
    seed: Tensor | None
    scales: list[Tensor | None]
    save_base: bool

    @property
    def at(self) -> Scales:
        """The scales by place."""
        return Scales(*self.scales)


class Backward(NamedTuple):
    """Arguments of ``lora_linear_bwd`` -> (dx, dA, dB, dbias, [gradient of the vector at each place]).

    ``needs``: as equation.Needs; what is not needed comes back empty. Vectors' gradients and dbias are in fp32 (fp64 for
    fp64), dx in dy's dtype, dA and dB in the adapters'. x is read for dA, dp_b and dp_d alone, h for dg_b, u for dB, dd
    and dg_d, the base for dx and dp_b.
    """

    dy: Tensor
    x: Tensor | None
    u: Tensor
    h: Tensor | None
    base: list[Tensor]
    kind: str
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float
    seed: Tensor | None
    scales: list[Tensor | None]
    needs: list[bool]

    @property
    def at(self) -> Scales:
        """The scales by place."""
        return Scales(*self.scales)

    @property
    def need(self) -> Needs:
        """The needed gradients by name."""
        return Needs(*self.needs)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    # BLAS libraries sum narrow products in one long chain, far less accurately than wide ones: not in a definition.
    if min(a.shape[0], b.shape[1]) >= 16 or a.shape[1] <= 64:
        return a @ b
    return torch.stack([p @ q for p, q in zip(a.split(64, dim=1), b.split(64), strict=True)]).sum(0)


def lora_linear_fwd_ref(c: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """(y, u, h); see ``Forward``."""
    acc, s = accumulate_dtype(c.x.dtype), c.at
    xf = c.x.to(acc)
    into, W = operands(c.kind, c.base, times(xf, s.p_b), (c.lora_B.shape[0], c.lora_A.shape[1]), False)
    h = into if W is None else _mm(into, W.t())
    u = _mm(times(dropped(xf, c.dropout_p, c.seed), s.p_d), c.lora_A.to(acc).t())
    delta = _mm(times(u, s.d) * c.scaling, c.lora_B.to(acc).t())
    y = times(h, s.g_b) + times(delta, s.g_d)
    if c.bias is not None:
        y = y + c.bias.to(acc)
    return y.to(c.x.dtype), u, h.to(c.x.dtype, copy=True) if c.save_base else c.x.new_empty(0)


def lora_linear_bwd_ref(c: Backward) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """(dx, dA, dB, dbias, gradients of the vectors); see ``Backward``."""
    acc, s, need = accumulate_dtype(c.dy.dtype), c.at, c.need
    dyf, A, B = c.dy.to(acc), c.lora_A.to(acc), c.lora_B.to(acc)
    dx, dA, dB = c.dy.new_empty(0), c.lora_A.new_empty(0), c.lora_B.new_empty(0)
    sums = {name: c.u.new_empty(0) for name in ("bias", *Scales._fields)}
    dv = _mm(times(dyf, s.g_d), B) * c.scaling
    du = times(dv, s.d)
    if need.x or need.p_b:
        into, W = operands(c.kind, c.base, times(dyf, s.g_b), (B.shape[0], A.shape[1]), True)
        base = into if W is None else _mm(into, W)
        if need.p_b:
            sums["p_b"] = (base * c.x.to(acc)).sum(0)
        if need.x:
            dx = (times(base, s.p_b) + dropped(times(_mm(du, A), s.p_d), c.dropout_p, c.seed)).to(c.dy.dtype)
    if need.A or need.p_d:
        G = _mm(du.t(), dropped(c.x.to(acc), c.dropout_p, c.seed))
        if need.A:
            dA = times(G, s.p_d).to(c.lora_A.dtype)
        if need.p_d:
            sums["p_d"] = (A * G).sum(0)
    if need.B or need.g_d:
        H = _mm(dyf.t(), times(c.u, s.d)) * c.scaling
        if need.B:
            dB = times(H.t(), s.g_d).t().to(c.lora_B.dtype).contiguous()
        if need.g_d:
            sums["g_d"] = (B * H).sum(1)
    if need.d:
        sums["d"] = (dv * c.u).sum(0)
    if need.g_b:
        sums["g_b"] = (dyf * c.h.to(acc)).sum(0)
    if need.bias:
        sums["bias"] = dyf.sum(0)
    return dx, dA, dB, sums["bias"], [sums[name] for name in Scales._fields]


def _check_branch(c: Forward | Backward, like: Tensor, N: int, K: int, R: int) -> None:
    """What both passes take. ``like``: of the activation's dtype and device."""
    if len(c.scales) != len(PLACES):
        raise ValueError(f"scales has {len(c.scales)} entries, expected {len(PLACES)}, one per place")
    sizes = {"R": R, "K": K, "N": N}
    for at, vector in zip(PLACES, c.scales, strict=True):
        if vector is not None:
            shape, dtypes = (sizes[at.axis],), (like.dtype, torch.float32)
            check_fits(names(at.symbol), vector, shape, f"({at.axis},)", like.device, dtypes)
    check_number("scaling", c.scaling)
    check_p(c.dropout_p)
    if c.dropout_p > 0.0:
        check_seed(c.seed, like.device)


def _options(c: Forward | Backward) -> dict:
    return {**c.at._asdict(), "dropout": c.dropout_p > 0.0, c.kind: c.kind != "dense"}


def _describe_fwd(c: Forward) -> Problem:
    _, columns = check_rows("x", c.x)
    kind = kind_of(c.kind)
    known = (None, None) if kind.sized else (columns, c.lora_B.shape[0] if c.lora_B.dim() == 2 else None)
    N, K = kind.check(c.base, c.x, *known)
    check_rows("x", c.x, K, "K")
    R = check_adapters(c.lora_A, c.lora_B, c.x, N, K)
    if c.bias is not None:
        check_fits("bias", c.bias, (N,), "(N,)", c.x.device, (c.x.dtype, torch.float32))
    _check_branch(c, c.x, N, K, R)
    present = {**_options(c), "bias": c.bias, "save_base": c.save_base}
    return problem_like(c.x, "lora_linear_fwd", c.lora_A.dtype, (c.x.shape[0], N, K, R), present)


def _describe_bwd(c: Backward) -> Problem:
    check_tensor("dy", c.dy)
    K = c.lora_A.shape[-1] if isinstance(c.lora_A, Tensor) and c.lora_A.dim() == 2 else 0
    R = check_adapters(c.lora_A, c.lora_B, c.dy, None, K)
    N, need, device = c.lora_B.shape[0], Needs(*c.needs), c.dy.device
    M, _ = check_rows("dy", c.dy, N, "N")
    check_fits("u", c.u, (M, R), "(M, R)", device, (accumulate_dtype(c.dy.dtype),))
    if need.A or need.p_d or need.p_b:
        check_fits("x", c.x, (M, K), "(M, K)", device, (c.dy.dtype,))
    if need.g_b:
        check_fits("h", c.h, (M, N), "(M, N)", device, (c.dy.dtype,))
    if need.x or need.p_b:
        kind_of(c.kind).check(c.base, c.dy, K, N)
    _check_branch(c, c.dy, N, K, R)
    present = {**_options(c), **{f"need_{name}": value for name, value in need._asdict().items()}}
    return problem_like(c.dy, "lora_linear_bwd", c.lora_A.dtype, (M, N, K, R), present)


def _fake_fwd(c: Forward):
    p = _describe_fwd(c)
    u = c.x.new_empty((p.M, p.R), dtype=accumulate_dtype(c.x.dtype))
    return c.x.new_empty((p.M, p.N)), u, c.x.new_empty((p.M, p.N) if c.save_base else 0)


def _fake_bwd(c: Backward):
    p, need = _describe_bwd(c), c.need
    sizes = {"R": p.R, "K": p.K, "N": p.N}
    return (
        c.dy.new_empty((p.M, p.K) if need.x else 0),
        c.lora_A.new_empty(c.lora_A.shape if need.A else 0),
        c.lora_B.new_empty(c.lora_B.shape if need.B else 0),
        c.u.new_empty(p.N if need.bias else 0),
        [c.u.new_empty(sizes[at.axis] if getattr(need, at.symbol) else 0) for at in PLACES],
    )


def _base_products(p: Problem) -> int:
    return 0 if "identity" in p.flags else p.M * p.N * p.K


def _flops_fwd(p: Problem, c: Forward) -> int:
    return 2 * (_base_products(p) + p.M * p.R * (p.K + p.N))


def _flops_bwd(p: Problem, c: Backward) -> int:
    products = p.N  # dv
    products += p.K if p.flags & {"need_A", "need_p_d"} else 0
    products += p.N if p.flags & {"need_B", "need_g_d"} else 0
    dx = _base_products(p) + p.M * p.K * p.R if p.flags & {"need_x", "need_p_b"} else 0
    return 2 * (p.M * p.R * products + dx)


define(
    "lora_linear_fwd",
    Forward,
    "(Tensor, Tensor, Tensor)",
    reference=lora_linear_fwd_ref,
    fake=_fake_fwd,
    describe=_describe_fwd,
    flops=_flops_fwd,
)
define(
    "lora_linear_bwd",
    Backward,
    "(Tensor, Tensor, Tensor, Tensor, Tensor[])",
    reference=lora_linear_bwd_ref,
    fake=_fake_bwd,
    describe=_describe_bwd,
    flops=_flops_bwd,
)

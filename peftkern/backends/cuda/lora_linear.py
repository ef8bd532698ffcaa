"""lora_linear on the CUDA kernels: the ops' arguments as launches (csrc/include/peftkern/cuda.h).

Forward: on sm_90 one launch makes the base product, u and the low-rank term; elsewhere, or for wide ranks, one launch
makes u first. Backward: one pass over dy gives du, the gradient of lora_B and the bias gradient, one pass over x gives
the gradient of lora_A, and the input gradient is the forward's kernel with W, A and B transposed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...problem import Problem
from ...settings import Settings
from . import native
from .native import dropout, floats, matrix, pointer, rows, vector

# Beyond, du's partial sums in the pass that makes dB cost more than a pass of its own over dy.
_FUSED_DOWN_RANK = 64
_UNSUPPORTED = {
    "lora_linear_fwd": ("p_b", "save_base", "identity"),
    # A scale of the base's output meets dy on its way to dx alone.
    "lora_linear_bwd": ("need_p_b", "need_p_d", "need_g_b", "need_g_d", "identity"),
}


def decline(problem: Problem, now: Settings) -> str | None:
    """Why no kernel here can take the problem."""
    if problem.dtype not in native.HALVES:
        return f"has kernels for bfloat16 and float16, not {problem.dtype}"
    found = [flag for flag in _UNSUPPORTED.get(problem.op, ()) if flag in problem.flags]
    if problem.op == "lora_linear_bwd" and problem.flags >= {"g_b", "need_x"}:
        found.append("g_b")
    if found:
        return f"no kernel with {', '.join(found)}"
    if problem.R > 512 or max(problem.M, problem.N, problem.K) >= 2**31:
        return "R is over 512, or a size is 2^31 or more"
    return None


def shrink(x: Tensor, p: Tensor, *, scale=None, d=None, alpha=1.0, drop=native.NO_DROPOUT) -> Tensor:
    """fp32 (M, R): d * alpha * (drop(x) * scale) p^T, p (R, C)."""
    (M, C), R = x.shape, p.shape[0]
    out = torch.empty((M, R), dtype=torch.float32, device=x.device)
    partial = floats(native._C.cuda_lora_shrink_partials(M, C, R, native.CODES[x.dtype]), x)
    native._C.cuda_lora_shrink(
        matrix(x), matrix(p), pointer(scale), pointer(d), alpha, drop, M, C, R, pointer(out), pointer(partial),
        native.stream(x),
    )  # fmt: skip
    return out


class _Linear(NamedTuple):
    """out = base_scale * (x w^T) + scaling * low_scale * ((d * v) b^T) + bias, w (N, K) or a transposed view.

    With ``a`` v is made of x: (drop(x) * in_scale) a^T; without, dropout acts on the low-rank term.
    """

    x: Tensor
    w: Tensor
    b: Tensor
    v: Tensor | None = None
    a: Tensor | None = None
    scaling: float = 1.0
    drop: tuple = native.NO_DROPOUT
    in_scale: Tensor | None = None
    d: Tensor | None = None
    base_scale: Tensor | None = None
    low_scale: Tensor | None = None
    bias: Tensor | None = None


def _linear(t: _Linear) -> tuple[Tensor, Tensor]:
    """(out, v)."""
    x, device, a, v, drop = t.x, native.device(t.x), t.a, t.v, t.drop
    (M, K), N, R = x.shape, t.w.shape[0], t.b.shape[1]
    by_row = t.w.stride(1) != 1 and t.w.stride(0) == 1
    w = rows(t.w.t()) if by_row else rows(t.w)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)

    def taken(hopper: bool, v: Tensor, a: Tensor | None, drop) -> bool:
        counters = None if a is None else native.counters(native._C.cuda_lora_linear_counters(M), x)
        return native._C.cuda_lora_linear(
            hopper, matrix(x), matrix(w), by_row, matrix(out), M, N, K, R, pointer(v), matrix(a), matrix(t.b), t.scaling,
            pointer(t.d), pointer(t.base_scale), pointer(t.low_scale), pointer(t.bias),
            native.CODES[x.dtype if t.bias is None else t.bias.dtype], drop, pointer(counters), device.multiprocessors,
            native.stream(x),
        )  # fmt: skip

    if a is not None:
        if device.arch == 90 and t.in_scale is None:
            v = torch.empty((M, R), dtype=torch.float32, device=x.device)
            if taken(True, v, a, drop):
                return out, v
        v, drop = shrink(x, a, scale=t.in_scale, drop=drop), native.NO_DROPOUT
    if not (device.arch == 90 and taken(True, v, None, drop)) and not taken(False, v, None, drop):
        raise RuntimeError(f"no CUDA kernel takes M={M} N={N} K={K} R={R} {x.dtype}")
    return out, v


def lora_linear_fwd(c):
    """(y, u, h), see ``peftkern.ops.lora_linear``."""
    s = c.at
    with native.on_device(c.x):
        y, u = _linear(_Linear(
            rows(c.x), c.base[0], c.lora_B, a=c.lora_A, scaling=c.scaling, drop=dropout(c.dropout_p, c.seed),
            in_scale=vector(s.p_d), d=vector(s.d), base_scale=vector(s.g_b), low_scale=vector(s.g_d),
            bias=None if c.bias is None else c.bias.contiguous(),
        ))  # fmt: skip
    return y, u, c.x.new_empty(0)


class _Grad(NamedTuple):
    """One pass over t (M, C): grad (R, C) = alpha v_scale * (v^T drop(t)) * column_scale, colsum (C) = sum_i t[i], and
    down (M, R) = d * down_alpha * (t * column_scale) p^T."""

    t: Tensor
    v: Tensor | None
    grad: Tensor | None
    alpha: float = 1.0
    drop: tuple = native.NO_DROPOUT
    v_scale: Tensor | None = None
    column_scale: Tensor | None = None
    p: Tensor | None = None
    d: Tensor | None = None
    down_alpha: float = 1.0
    colsum: bool = False


def _grad(g: _Grad) -> tuple[Tensor | None, Tensor | None]:
    """(down, colsum); writes ``grad``."""
    t = g.t
    (M, C), R = t.shape, max(0 if m is None else m.shape[0] for m in (g.p, g.grad))
    down = torch.empty((M, R), dtype=torch.float32, device=t.device) if g.p is not None else None
    sums = torch.empty(C, dtype=torch.float32, device=t.device) if g.colsum else None
    if t.numel() == 0:  # an address of 0 would mean something else
        for out in (g.grad, down, sums):
            if out is not None:
                out.zero_()
        return down, sums
    args = (
        matrix(t), g.drop, M, C, R, pointer(g.v), pointer(g.v_scale), g.alpha, pointer(g.column_scale), matrix(g.grad),
        matrix(g.p), pointer(g.d), g.down_alpha, pointer(down), pointer(sums),
    )  # fmt: skip
    partial = floats(native._C.cuda_lora_grad_partials(*args), t)
    native._C.cuda_lora_grad(*args, pointer(partial), native.device(t).overlaps, native.stream(t))
    return down, sums


def lora_linear_bwd(c):
    """(dx, dA, dB, dbias, vectors' gradients), see ``peftkern.ops.lora_linear``."""
    need, s, drop = c.need, c.at, dropout(c.dropout_p, c.seed)
    d, p_d, g_d = vector(s.d), vector(s.p_d), vector(s.g_d)
    # d's own gradient needs what du is before d.
    scale_du = None if need.d else d
    dA, dB = (t.new_empty(t.shape if n else 0) for t, n in ((c.lora_A, need.A), (c.lora_B, need.B)))
    dx, dbias, dd, du = c.dy.new_empty(0), None, None, None
    with native.on_device(c.dy):
        dy, p = rows(c.dy), c.lora_B.t()
        if need.B or need.bias:
            du, dbias = _grad(_Grad(
                dy, c.u if need.B else None, dB.t() if need.B else None, alpha=c.scaling, v_scale=d,
                column_scale=g_d, p=p if p.shape[0] <= _FUSED_DOWN_RANK else None, d=scale_du,
                down_alpha=c.scaling, colsum=need.bias,
            ))  # fmt: skip
        if du is None and (need.x or need.A or need.d):
            du = shrink(dy, p, scale=g_d, d=scale_du, alpha=c.scaling)
        if need.d:
            dd = (du * c.u).sum(0)
            du = du if d is None else du * d
        if need.A:
            _grad(_Grad(rows(c.x), du, dA, drop=drop, column_scale=p_d))
        if need.x:
            dx, _ = _linear(_Linear(
                dy, c.base[0].t(), c.lora_A.t(), rows(du), drop=drop, base_scale=vector(s.p_b), low_scale=p_d
            ))  # fmt: skip
    sums = (c.u.new_empty(0) if t is None else t for t in (dbias, dd, None, None, None, None))
    return dx, dA, dB, next(sums), list(sums)


def lora_row_norm(c):
    """fp32 (N,), see ``peftkern.ops.lora_row_norm``."""
    (N, K), R = c.base[0].shape, c.lora_A.shape[0]
    with native.on_device(c.base[0]):
        weight = rows(c.base[0])
        out = torch.empty(N, dtype=torch.float32, device=weight.device)
        partial = floats(native._C.cuda_lora_row_norm_partials(N, K, R), weight)
        native._C.cuda_lora_row_norm(
            matrix(weight), matrix(c.lora_A), matrix(c.lora_B), c.scaling, N, K, R, pointer(out), pointer(partial),
            native.device(weight).overlaps, native.stream(weight),
        )  # fmt: skip
    return out


OPS = {"lora_row_norm": lora_row_norm, "lora_linear_fwd": lora_linear_fwd, "lora_linear_bwd": lora_linear_bwd}

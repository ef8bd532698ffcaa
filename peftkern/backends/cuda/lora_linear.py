"""lora_linear on the CUDA kernels: the ops' arguments as launches (csrc/include/peftkern/cuda.h).

Forward: on sm_90 one launch makes the base product, u and the low-rank term; elsewhere, or for wide ranks, one launch
makes u first. Backward: one pass over dy gives du, the gradient of lora_B and the bias gradient, one pass over x gives
the gradient of lora_A, and the input gradient is the forward's kernel with W, A and B transposed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import Problem
from . import native
from .native import dropout, floats, matrix, pointer, rows, vector

# Beyond, du's partial sums in the pass that makes dB cost more than a pass of its own over dy.
_FUSED_DOWN_RANK = 64
_UNSUPPORTED = {
    "lora_linear_fwd": ("base_in_scale", "save_base"),
    "lora_linear_bwd_input": ("base_out_scale", "need_base_in"),
    "lora_linear_bwd_adapter": ("need_delta_in", "need_base_out", "need_delta_out"),
}


def decline(problem: Problem) -> str | None:
    """Why no kernel here can take the problem."""
    if problem.dtype not in native.HALVES:
        return f"has kernels for bfloat16 and float16, not {problem.dtype}"
    found = [flag for flag in _UNSUPPORTED.get(problem.op, ()) if flag in problem.flags]
    if found:
        return f"no kernel with {', '.join(found)}"
    if problem.R > 512 or max(problem.M, problem.N, problem.K) >= 2**31:
        return "R is over 512, or a size is 2^31 or more"
    return None


def _shrink(x: Tensor, p: Tensor, *, scale=None, rank_scale=None, alpha=1.0, drop=native.NO_DROPOUT) -> Tensor:
    """fp32 (M, R): rank_scale * alpha * (drop(x) * scale) p^T, p (R, C)."""
    (M, C), R = x.shape, p.shape[0]
    out = torch.empty((M, R), dtype=torch.float32, device=x.device)
    partial = floats(native._C.cuda_lora_shrink_partials(M, C, R, native.CODES[x.dtype]), x)
    native._C.cuda_lora_shrink(
        matrix(x), matrix(p), pointer(scale), pointer(rank_scale), alpha, drop, M, C, R, pointer(out), pointer(partial),
        native.stream(x),
    )  # fmt: skip
    return out


def _linear(
    x: Tensor, w: Tensor, b: Tensor, v: Tensor | None, *, a: Tensor | None = None, scaling=1.0, drop=native.NO_DROPOUT,
    delta_in_scale=None, rank_scale=None, base_scale=None, low_scale=None, bias=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, v): x w^T with v b^T added, both scaled; w (N, K) may be a transposed view. With ``a`` v is made of x."""
    device = native.device(x)
    (M, K), N, R = x.shape, w.shape[0], b.shape[1]
    by_row = w.stride(1) != 1 and w.stride(0) == 1
    w = rows(w.t()) if by_row else rows(w)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)

    def taken(hopper: bool, v: Tensor, a: Tensor | None, drop) -> bool:
        counters = None if a is None else native.counters(native._C.cuda_lora_linear_counters(M), x)
        return native._C.cuda_lora_linear(
            hopper, matrix(x), matrix(w), by_row, matrix(out), M, N, K, R, pointer(v), matrix(a), matrix(b), scaling,
            pointer(rank_scale), pointer(base_scale), pointer(low_scale), pointer(bias),
            native.CODES[x.dtype if bias is None else bias.dtype], drop, pointer(counters), device.multiprocessors,
            native.stream(x),
        )  # fmt: skip

    if a is not None:
        if device.arch == 90 and delta_in_scale is None:
            v = torch.empty((M, R), dtype=torch.float32, device=x.device)
            if taken(True, v, a, drop):
                return out, v
        v, drop = _shrink(x, a, scale=delta_in_scale, drop=drop), native.NO_DROPOUT
    if not (device.arch == 90 and taken(True, v, None, drop)) and not taken(False, v, None, drop):
        raise RuntimeError(f"no CUDA kernel takes M={M} N={N} K={K} R={R} {x.dtype}")
    return out, v


def lora_linear_fwd(
    x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed,
    rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale, save_base,
):  # fmt: skip
    """(y, u, h), see ``peftkern.ops.lora_linear``."""
    with native.on_device(x):
        y, u = _linear(
            rows(x), weight, lora_B, None, a=lora_A, scaling=scaling, drop=dropout(dropout_p, seed),
            delta_in_scale=vector(delta_in_scale), rank_scale=vector(rank_scale), base_scale=vector(base_out_scale),
            low_scale=vector(delta_out_scale), bias=None if bias is None else bias.contiguous(),
        )  # fmt: skip
    return y, u, x.new_empty(0)


def _grad(
    t: Tensor, v: Tensor | None, grad: Tensor | None, *, alpha=1.0, drop=native.NO_DROPOUT, v_scale=None,
    column_scale=None, p: Tensor | None = None, rank_scale=None, down_alpha=1.0, colsum=False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(down (M, R), colsum (C)) of one pass over t (M, C), and into ``grad`` (R, C) its product with v."""
    (M, C), R = t.shape, max(0 if m is None else m.shape[0] for m in (p, grad))
    down = torch.empty((M, R), dtype=torch.float32, device=t.device) if p is not None else None
    sums = torch.empty(C, dtype=torch.float32, device=t.device) if colsum else None
    if t.numel() == 0:  # an address of 0 would mean something else
        for out in (grad, down, sums):
            if out is not None:
                out.zero_()
        return down, sums
    args = (
        matrix(t), drop, M, C, R, pointer(v), pointer(v_scale), alpha, pointer(column_scale), matrix(grad), matrix(p),
        pointer(rank_scale), down_alpha, pointer(down), pointer(sums),
    )  # fmt: skip
    partial = floats(native._C.cuda_lora_grad_partials(*args), t)
    native._C.cuda_lora_grad(*args, pointer(partial), native.device(t).overlaps, native.stream(t))
    return down, sums


def lora_linear_bwd_adapter(
    dy, x, u, h, lora_A, lora_B, scaling, dropout_p, seed, rank_scale, delta_in_scale, delta_out_scale,
    need_A, need_B, need_bias, need_rank_scale, need_delta_in, need_base_out, need_delta_out,
):  # fmt: skip
    """(du, dA, dB, dbias, drank_scale, ddelta_in, dbase_out, ddelta_out), see ``peftkern.ops.lora_linear``."""
    empty = u.new_empty(0)
    rank_scale, delta_in_scale, delta_out_scale = vector(rank_scale), vector(delta_in_scale), vector(delta_out_scale)
    # d's own gradient needs what du is before d.
    d = None if need_rank_scale else rank_scale
    dA, dB, dbias, drank = lora_A.new_empty(lora_A.shape if need_A else 0), lora_B.new_empty(0), empty, empty
    with native.on_device(dy):
        dy, p = rows(dy), lora_B.t()
        du = None
        if need_B or need_bias:
            dB = lora_B.new_empty(lora_B.shape if need_B else 0)
            du, dbias = _grad(
                dy, u if need_B else None, dB.t() if need_B else None, alpha=scaling, v_scale=rank_scale,
                column_scale=delta_out_scale, p=p if p.shape[0] <= _FUSED_DOWN_RANK else None, rank_scale=d,
                down_alpha=scaling, colsum=need_bias,
            )  # fmt: skip
        if du is None:
            du = _shrink(dy, p, scale=delta_out_scale, rank_scale=d, alpha=scaling)
        if need_rank_scale:
            drank = (du * u).sum(0)
            du = du if rank_scale is None else du * rank_scale
        if need_A:
            _grad(rows(x), du, dA, drop=dropout(dropout_p, seed), column_scale=delta_in_scale)
    return du, dA, dB, dbias if need_bias else empty, drank, empty, empty, empty


def lora_linear_bwd_input(
    dy, du, x, weight, lora_A, dropout_p, seed, base_in_scale, delta_in_scale, base_out_scale, need_base_in
):
    """(dx, dbase_in), see ``peftkern.ops.lora_linear``."""
    with native.on_device(dy):
        dx, _ = _linear(
            rows(dy), weight.t(), lora_A.t(), rows(du), drop=dropout(dropout_p, seed), base_scale=vector(base_in_scale),
            low_scale=vector(delta_in_scale),
        )  # fmt: skip
    return dx, du.new_empty(0)


def lora_row_norm(weight, lora_A, lora_B, scaling):
    """fp32 (N,), see ``peftkern.ops.lora_row_norm``."""
    (N, K), R = weight.shape, lora_A.shape[0]
    with native.on_device(weight):
        weight = rows(weight)
        out = torch.empty(N, dtype=torch.float32, device=weight.device)
        partial = floats(native._C.cuda_lora_row_norm_partials(N, K, R), weight)
        native._C.cuda_lora_row_norm(
            matrix(weight), matrix(lora_A), matrix(lora_B), scaling, N, K, R, pointer(out), pointer(partial),
            native.device(weight).overlaps, native.stream(weight),
        )  # fmt: skip
    return out


OPS = {
    "lora_row_norm": lora_row_norm,
    "lora_linear_fwd": lora_linear_fwd,
    "lora_linear_bwd_adapter": lora_linear_bwd_adapter,
    "lora_linear_bwd_input": lora_linear_bwd_input,
}

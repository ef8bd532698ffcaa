"""Gradients of the adapters and of the vectors beside them: one pass over dy, one over x.

dv = s (g_d * dy) B       du = d * dv          dB = s g_d[:, None] * H,  H = dy^T (d * u)      dbias = sum_t dy
dA = G * p_d,  G = du^T drop(x)                dd = sum_t dv * u         dg_d = s rowdot(B, H)
dp_d = coldot(A, G)                            dg_b = sum_t dy * h
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import configs, launch
from .adapter_grad import adapter_grad_kernel, finish_kernel
from .configs import cdiv
from .lora_linear import ADD_ROWS, Dropout, Settings, add_blocks, add_rows, row_stride, rows_of, shrink, terms, vector


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    A: bool
    B: bool
    bias: bool
    rank_scale: bool
    delta_in: bool
    base_out: bool
    delta_out: bool


def _one_pass(
    t: Tensor, R: int, s: Settings, *, grad: bool = False, v: Tensor | None = None, v_scale=None, down: bool = False,
    b: Tensor | None = None, b_scale=None, sums: bool = False, h: Tensor | None = None, drop: Dropout, adapter,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(grad (ranges, C, R), parts (blocks, M, R), sums (ranges, C), products (ranges, C)); None if not asked for."""
    M, C = t.shape
    config = configs.adapter_grad(C, R, t.element_size(), s.arch, down=down, products=h is not None)
    config = s.config("adapter_grad", config, t.element_size())
    ranges, rows = s.pick("grad_ranges", configs.grad_ranges(M, C, R, config))

    def buffer(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=t.device) if wanted else None

    blocks = cdiv(C, config.block_c)
    out = dict(
        grad=buffer(grad, ranges, C, R), parts=buffer(down, blocks, M, R), sums=buffer(sums, ranges, C),
        products=buffer(h is not None, ranges, C),
    )  # fmt: skip
    down_terms = terms(t.dtype, adapter, b_scale is not None, s.allow_tf32)
    grad_terms = terms(t.dtype, adapter, True, s.allow_tf32)
    drop_args = drop.args
    drop_args.pop("inverse_keep")
    args = dict(
        **out, t=t, v=v, b=b, h=h, v_scale=v_scale, b_scale=b_scale, M=M, C=C, R=R, stride_t=row_stride(t),
        stride_v=row_stride(v) if v is not None else 0, stride_h=row_stride(h) if h is not None else 0,
        stride_b_col=b.stride(0) if b is not None else 0, stride_b_rank=b.stride(1) if b is not None else 0,
        rows_per_program=rows, **drop_args,
    )  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m, BLOCK_C=config.block_c, RANK=config.rank, T_TERMS=grad_terms[0],
        V_TERMS=grad_terms[1], B_T_TERMS=down_terms[0], B_TERMS=down_terms[1],
        R_ALIGN=configs.alignment(R, args["stride_v"]), B_ALIGN=configs.alignment(args["stride_b_col"]), PRECISION=s.precision,
    )  # fmt: skip
    grid = (blocks, ranges, max(1, cdiv(R, config.rank) if grad or down else 1))
    launch.submit(launch.Launch(adapter_grad_kernel, grid, args, constants, config.warps, config.stages))
    return out["grad"], out["parts"], out["sums"], out["products"]


def _finish(
    grad: Tensor, out: Tensor | None, by_column: bool, other: Tensor, scale, factor: float, dots: bool
) -> Tensor | None:
    """out = scale * factor * sum of grad, (C, R) if ``by_column`` else (R, C); dots = rowdot(other (C, R), that)."""
    ranges, C, R = grad.shape
    dot = torch.empty(C, dtype=torch.float32, device=grad.device) if dots else None
    strides = (0, 0) if out is None else out.stride() if by_column else (out.stride(1), out.stride(0))
    args = dict(
        out=out, dots=dot, grad=grad, other=other if dots else None, scale=scale, C=C, R=R,
        stride_out_col=strides[0], stride_out_rank=strides[1],
        stride_other_col=other.stride(0), stride_other_rank=other.stride(1), ranges=ranges, factor=factor,
    )  # fmt: skip
    constants = dict(
        BLOCK_C=32, RANK=configs.rank_block(R, 32), R_ALIGN=configs.alignment(R),
        COL_ALIGN=configs.alignment(args["stride_out_col"], args["stride_other_col"]),
    )  # fmt: skip
    launch.submit(launch.Launch(finish_kernel, (cdiv(C, 32),), args, constants, 4, 2))
    return dot


def backward_adapter(
    dy, x, u, h, lora_A, lora_B, scaling: float, drop: Dropout, rank_scale, delta_in_scale, delta_out_scale,
    need: Needs, s: Settings,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(du, dA, dB, dbias, drank_scale, ddelta_in, dbase_out, ddelta_out) of ``lora_linear_bwd_adapter``."""
    M, N = dy.shape
    R, K = lora_A.shape
    dy, u = rows_of(dy), u.contiguous()
    rank_scale, in_scale, out_scale = vector(rank_scale), vector(delta_in_scale), vector(delta_out_scale)
    wants_A, wants_B = need.A or need.delta_in, need.B or need.delta_out

    def zeros(wanted: bool, size: int) -> Tensor:
        return torch.zeros(size if wanted else 0, dtype=torch.float32, device=dy.device)

    dA = torch.zeros((R, K), dtype=lora_A.dtype, device=dy.device) if need.A else lora_A.new_empty(0)
    dB = torch.zeros((N, R), dtype=lora_B.dtype, device=dy.device) if need.B else lora_B.new_empty(0)
    dbias, dbase_out = zeros(need.bias, N), zeros(need.base_out, N)
    drank, ddelta_in, ddelta_out = zeros(need.rank_scale, R), zeros(need.delta_in, K), zeros(need.delta_out, N)
    du = torch.zeros((M, R), dtype=torch.float32, device=dy.device) if N == 0 or M == 0 or R == 0 else None
    if M == 0:
        return du, dA, dB, dbias, drank, ddelta_in, dbase_out, ddelta_out

    partial = None
    if du is None and need.rank_scale:
        partial = torch.empty((cdiv(M, ADD_ROWS), R), dtype=torch.float32, device=dy.device)
    fused = du is None and configs.fuse_down(R)
    wants_G = du is None and wants_B
    if N > 0 and (fused or wants_G or need.bias or need.base_out):
        grad, parts, sums, products = _one_pass(
            dy, R, s, grad=wants_G, v=u, v_scale=rank_scale, down=fused, b=lora_B if fused else None,
            b_scale=out_scale if fused else None, sums=need.bias, h=rows_of(h) if need.base_out else None,
            drop=Dropout(), adapter=lora_B.dtype,
        )  # fmt: skip
        if fused:
            du = torch.empty((M, R), dtype=torch.float32, device=dy.device)
            add_blocks(du, parts, rank_scale, u, partial, scaling)
        if wants_G:
            dots = _finish(grad, dB if need.B else None, True, lora_B, out_scale, scaling, need.delta_out)
            ddelta_out = dots if need.delta_out else ddelta_out
        dbias = add_rows(sums) if need.bias else dbias
        dbase_out = add_rows(products) if need.base_out else dbase_out
    if du is None:
        du = shrink(dy, lora_B.t(), out_scale, Dropout(), s, scaling, rank_scale, u, partial)
    drank = add_rows(partial) if partial is not None else drank
    if wants_A and R > 0 and K > 0:
        grad, _, _, _ = _one_pass(rows_of(x), R, s, grad=True, v=du, drop=drop, adapter=lora_A.dtype)
        factor = drop.args["inverse_keep"]
        dots = _finish(grad, dA if need.A else None, False, lora_A.t(), in_scale, factor, need.delta_in)
        ddelta_in = dots if need.delta_in else ddelta_in
    return du, dA, dB, dbias, drank, ddelta_in, dbase_out, ddelta_out

"""The backward pass of lora_linear: one pass over dy, one over x, and the forward's product for the input gradient.

dv = s (g_d * dy) B       du = d * dv          dB = s g_d[:, None] * H,  H = dy^T (d * u)      dbias = sum_t dy
dA = G * p_d,  G = du^T drop(x)                dd = sum_t dv * u         dg_d = s rowdot(B, H)
dp_d = coldot(A, G)                            dg_b = sum_t dy * h
dx = ((g_b * dy) W) * p_b + drop'((du A) * p_d)                          dp_b = sum_t ((g_b * dy) W) * x
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import configs, launch
from .adapter_grad import adapter_grad_kernel, finish_kernel
from .call import Backward, Dropout, Scales, Settings
from .configs import cdiv
from .lora_linear import ADD_ROWS, Base, Finish, LowRank, add_blocks, add_rows, linear, shrink, terms
from .operand import row_stride, rows_of, vector


class Pass(NamedTuple):
    """What is made of t (M, C) in one pass; what is None is not.

    t^T (v_scale * v), v (M, R); t (b * b_scale), b (C, R); column sums of t, and of t * h. ``adapter``: a dtype.
    ``weights`` (M): of the rows, in the column sums of t.
    """

    t: Tensor
    R: int
    adapter: torch.dtype
    v: Tensor | None = None
    v_scale: Tensor | None = None
    b: Tensor | None = None
    b_scale: Tensor | None = None
    sums: bool = False
    h: Tensor | None = None
    drop: Dropout = Dropout()
    weights: Tensor | None = None


def one_pass(p: Pass, s: Settings) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(grad (ranges, C, R), parts (blocks, M, R), sums (ranges, C), products (ranges, C)); None if not asked for."""
    t, v, b, h, (M, C), R = p.t, p.v, p.b, p.h, p.t.shape, p.R
    down = b is not None
    config = configs.adapter_grad(
        C, R, t.element_size(), s.arch, down=down, products=h is not None or p.weights is not None
    )
    config = s.config("adapter_grad", config, t.element_size())
    ranges, rows = s.pick("grad_ranges", configs.grad_ranges(M, C, R, config))

    def buffer(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=t.device) if wanted else None

    blocks = cdiv(C, config.block_c)
    out = dict(
        grad=buffer(v is not None, ranges, C, R), parts=buffer(down, blocks, M, R), sums=buffer(p.sums, ranges, C),
        products=buffer(h is not None, ranges, C),
    )  # fmt: skip
    down_terms = terms(t.dtype, p.adapter, p.b_scale is not None, s.allow_tf32)
    grad_terms = terms(t.dtype, p.adapter, True, s.allow_tf32)
    args = dict(
        **out, t=t, v=v, b=b, h=h, v_scale=p.v_scale, b_scale=p.b_scale, weights=p.weights, M=M, C=C, R=R, stride_t=row_stride(t),
        stride_v=row_stride(v) if v is not None else 0, stride_h=row_stride(h) if h is not None else 0,
        stride_b_col=b.stride(0) if down else 0, stride_b_rank=b.stride(1) if down else 0,
        rows_per_program=rows, **p.drop.args,
    )  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m, BLOCK_C=config.block_c, RANK=config.rank, T_TERMS=grad_terms[0],
        V_TERMS=grad_terms[1], B_T_TERMS=down_terms[0], B_TERMS=down_terms[1],
        R_ALIGN=configs.alignment(R, args["stride_v"]), B_ALIGN=configs.alignment(args["stride_b_col"]), PRECISION=s.precision,
    )  # fmt: skip
    grid = (blocks, ranges, max(1, cdiv(R, config.rank) if v is not None or down else 1))
    launch.submit(launch.Launch(adapter_grad_kernel, grid, args, constants, config.warps, config.stages))
    return out["grad"], out["parts"], out["sums"], out["products"]


def finish(
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


def backward(c: Backward, s: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """(dx, dA, dB, dbias, gradients of the scales) of ``lora_linear_bwd``; what is not needed is empty."""
    du, dA, dB, dbias, (dd, dp_b, dp_d, dg_b, dg_d) = backward_adapter(c, s)
    dx = None
    if c.needs.x or c.needs.p_b:
        dx, dp_b = backward_input(c, du, s)
    return dx if c.needs.x else c.dy.new_empty(0), dA, dB, dbias, [dd, dp_b, dp_d, dg_b, dg_d]


def backward_adapter(c: Backward, s: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """(du, dA, dB, dbias, gradients of the scales but p_b); du if anything needs it."""
    need, (M, N), (R, K) = c.needs, c.dy.shape, c.lora_A.shape
    c = c._replace(dy=rows_of(c.dy), u=c.u.contiguous(), scales=Scales(*map(vector, c.scales)))
    sizes = dict(bias=N, d=R, p_b=0, p_d=K, g_b=N, g_d=N)
    sums = {
        name: torch.zeros(size if getattr(need, name) else 0, dtype=torch.float32, device=c.dy.device)
        for name, size in sizes.items()
    }
    dA, dB = (t.new_zeros(t.shape if n else 0) for t, n in ((c.lora_A, need.A), (c.lora_B, need.B)))
    du = torch.zeros((M, R), dtype=torch.float32, device=c.dy.device) if 0 in (M, N, R) else None
    if M > 0:
        du = _over_dy(c, du, dB, sums, s)
        if (need.A or need.p_d) and R > 0 and K > 0:
            _over_x(c, du, dA, sums, s)
    du = c.u.new_empty(0) if du is None else du
    dbias, *scales = sums.values()
    return du, dA, dB, dbias, scales


def backward_input(c: Backward, du: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """(dx, dp_b if it is needed): the forward's kernel with W, A and B transposed."""
    weight = None if c.weight is None else c.weight.t()
    factor = rows_of(c.x) if c.needs.p_b else None
    base = Base(rows_of(c.dy), weight, vector(c.scales.g_b), vector(c.scales.p_b), factor=factor)
    low = LowRank(rows_of(du), c.lora_A.t(), g=vector(c.scales.p_d), drop=c.dropout)
    dx, _, sums = linear(base, low, None, s)
    return dx, du.new_empty(0) if sums is None else sums


def _over_dy(c: Backward, du: Tensor | None, dB: Tensor, sums: dict[str, Tensor], s: Settings) -> Tensor | None:
    """du if anything needs it, given where it is zero; fills dB and the sums that dy alone gives."""
    need, (M, N), R, d, g_d = c.needs, c.dy.shape, c.u.shape[1], c.scales.d, c.scales.g_d
    given = du is not None
    wants_du = not given and (need.x or need.A or need.d or need.p_b or need.p_d)
    wants_H = not given and (need.B or need.g_d)
    partial = None
    if not given and need.d:
        partial = torch.empty((cdiv(M, ADD_ROWS), R), dtype=torch.float32, device=c.dy.device)
    then = Finish(c.scaling, d, c.u, partial)
    fused = wants_du and configs.fuse_down(R)
    if N > 0 and (fused or wants_H or need.bias or need.g_b):
        grad, parts, columns, products = one_pass(Pass(
            c.dy, R, c.lora_B.dtype, c.u if wants_H else None, d if wants_H else None, c.lora_B if fused else None,
            g_d if fused else None, need.bias, rows_of(c.h) if need.g_b else None,
        ), s)  # fmt: skip
        if fused:
            du = torch.empty((M, R), dtype=torch.float32, device=c.dy.device)
            add_blocks(du, parts, then)
        if wants_H:
            dots = finish(grad, dB if need.B else None, True, c.lora_B, g_d, c.scaling, need.g_d)
            sums["g_d"] = dots if need.g_d else sums["g_d"]
        if need.bias:
            sums["bias"] = add_rows(columns)
        if need.g_b:
            sums["g_b"] = add_rows(products)
    if wants_du and du is None:
        du = shrink(c.dy, c.lora_B.t(), g_d, Dropout(), s, then)
    if partial is not None:
        sums["d"] = add_rows(partial)
    return du


def _over_x(c: Backward, du: Tensor, dA: Tensor, sums: dict[str, Tensor], s: Settings) -> None:
    """Fills dA and dp_d."""
    grad, _, _, _ = one_pass(Pass(rows_of(c.x), du.shape[1], c.lora_A.dtype, du, drop=c.dropout), s)
    out = dA if c.needs.A else None
    dots = finish(grad, out, False, c.lora_A.t(), c.scales.p_d, c.dropout.factor, c.needs.p_d)
    sums["p_d"] = dots if c.needs.p_d else sums["p_d"]

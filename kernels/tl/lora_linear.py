"""lora_linear as launches: the forward pass, and the products that both passes are made of.

    y = g_b * ((x * p_b) W^T) + s * g_d * ((d * u) B^T) + bias,        u = (drop(x) * p_d) A^T

Tensors in, tensors out; the sizes and dtypes are those of ``peftkern.ops.lora_linear`` and have been checked there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import configs, launch
from .adapter_grad import add_rows_kernel
from .call import Dropout, Forward, Settings
from .configs import cdiv
from .expand import expand_kernel
from .operand import by_column, describable, descriptor, row_stride, rows_of, vector
from .quantised.codes import Quantised
from .quantised.panels import times
from .shrink import add_blocks_kernel, shrink_kernel


def terms(tile: torch.dtype, adapter: torch.dtype, computed: bool, tf32: bool) -> tuple[int, int]:
    """bf16 terms of (an activation tile, an operand made from an adapter); (0, 0) is native.

    ``computed``: the operand is an fp32 value (a rank vector, or an adapter times a scale), not the adapter itself. It
    takes three terms where the sum is kept in fp32, two where an adapter in half precision rounds it anyway.
    """
    if tile == torch.float32 or (adapter == tile and not computed):
        return 0, 0
    return (1 if tile == torch.bfloat16 else 2), (2 if tf32 or adapter != torch.float32 else 3)


def expand_terms(tile: torch.dtype, adapter: torch.dtype, computed: bool) -> tuple[int, int]:
    """bf16 terms of (rank vector, adapter) where the sum is rounded to ``tile``: two hold twice its precision."""
    if tile == torch.float32:
        return 0, 0
    return 2, 1 if adapter == torch.bfloat16 and not computed else 2


class Finish(NamedTuple):
    """What becomes of a sum over columns: factor and d scale it; ``partial`` takes column sums of (it without d) * u."""

    factor: float = 1.0
    d: Tensor | None = None
    u: Tensor | None = None
    partial: Tensor | None = None


PLAIN = Finish()


def shrink(x: Tensor, A: Tensor, scale: Tensor | None, drop: Dropout, s: Settings, then: Finish = PLAIN) -> Tensor:
    """d * factor * (drop(x) * scale) A^T, fp32 (M, R)."""
    (M, K), R = x.shape, A.shape[0]
    out = torch.empty((M, R), dtype=torch.float32, device=x.device)
    if M == 0 or R == 0:
        return out
    if K == 0:
        return out.zero_()
    config = configs.shrink(K, R, x.element_size(), s.arch)
    config = s.config("shrink", config, x.element_size())
    several = _share(x, R, config, s)[1] > 1 or then.d is not None or then.partial is not None
    then = then._replace(factor=then.factor * drop.factor)
    if several:
        add_blocks(out, shrink_parts(x, A, scale, drop, config, s), then)
    else:
        _shrink_into(out, x, A, scale, drop, config, s, then.factor)
    return out


def shrink_parts(
    x: Tensor, A: Tensor, scale: Tensor | None, drop: Dropout, config: configs.LaunchConfig, s: Settings
) -> Tensor:
    """The products of blocks of columns, fp32 (blocks, M, R): the sum that ``shrink`` makes, without its factors."""
    parts = x.new_empty((cdiv(x.shape[1], config.block_k), x.shape[0], A.shape[0]), dtype=torch.float32)
    if parts.numel() > 0:
        _shrink_into(parts, x, A, scale, drop, config, s)
    return parts


def _share(x: Tensor, R: int, config: configs.LaunchConfig, s: Settings) -> tuple[int, int]:
    # (blocks of columns that a program adds up, programs)
    blocks = cdiv(x.shape[1], config.block_k)
    groups = s.pick("shrink_groups", configs.shrink_groups(x.shape[0], x.shape[1], R, config))
    per = cdiv(blocks, groups)
    return per, cdiv(blocks, per)


def _shrink_into(
    into: Tensor, x: Tensor, A: Tensor, scale: Tensor | None, drop: Dropout, config, s: Settings, factor: float = 1.0
) -> None:
    (M, K), R = x.shape, A.shape[0]
    per, programs = _share(x, R, config, s)
    x_terms, a_terms = terms(x.dtype, A.dtype, scale is not None, s.allow_tf32)
    args = dict(
        u=into, x=x, a=A, in_scale=scale, M=M, K=K, R=R, stride_x=row_stride(x), stride_a_rank=A.stride(0),
        stride_a_k=A.stride(1), blocks_per_program=per, factor=factor, **drop.args,
    )  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m, BLOCK_K=config.block_k, RANK=config.rank, PARTIAL=into.dim() == 3,
        X_TERMS=x_terms, A_TERMS=a_terms, R_ALIGN=configs.alignment(R), PRECISION=s.precision,
    )  # fmt: skip
    grid = (cdiv(M, config.block_m), programs, cdiv(R, config.rank))
    launch.submit(launch.Launch(shrink_kernel, grid, args, constants, config.warps, config.stages))


ADD_ROWS = 64


def add_blocks(out: Tensor, parts: Tensor, then: Finish) -> None:
    """out (M, R) = the sum of ``parts`` (blocks, M, R), finished."""
    blocks, M, R = parts.shape
    rank = configs.rank_block(R)
    u = None if then.partial is None else then.u
    args = dict(out=out, parts=parts, d=then.d, u=u, partial=then.partial, M=M, R=R, blocks=blocks, factor=then.factor)
    grid = (cdiv(M, ADD_ROWS), cdiv(R, rank))
    constants = dict(BLOCK_M=ADD_ROWS, RANK=rank, R_ALIGN=configs.alignment(R))
    launch.submit(launch.Launch(add_blocks_kernel, grid, args, constants, 4, 2))


def add_rows(parts: Tensor) -> Tensor:
    """Column sums of an fp32 matrix."""
    ranges, C = parts.shape
    if ranges == 1:
        return parts[0]
    out = torch.empty(C, dtype=torch.float32, device=parts.device)
    args = dict(out=out, parts=parts, C=C, ranges=ranges)
    launch.submit(launch.Launch(add_rows_kernel, (cdiv(C, 64),), args, dict(BLOCK_M=32, BLOCK_C=64), 4, 2))
    return out


class Base(NamedTuple):
    """g * base, base = (x * p) weight^T: weight (N, K), dense or in codes, or None for the identity.

    ``keep``: the base is wanted by itself. ``factor`` (M, N): column sums of base * factor are.
    """

    x: Tensor
    weight: Tensor | Quantised | None
    p: Tensor | None = None
    g: Tensor | None = None
    keep: bool = False
    factor: Tensor | None = None

    @property
    def columns(self) -> int:
        """N."""
        return self.x.shape[1] if self.weight is None else self.weight.shape[0]


class LowRank(NamedTuple):
    """scaling * (v * d) (b * g)^T, dropped; b (out columns, R). ``join``: to call before v is read."""

    v: Tensor
    b: Tensor
    scaling: float = 1.0
    d: Tensor | None = None
    g: Tensor | None = None
    drop: Dropout = Dropout()
    join: Callable[[], None] | None = None


def expand(out: Tensor, base: Base, h: Tensor | None, low: LowRank, bias, fused: bool, s: Settings) -> Tensor | None:
    """out = g * base + low-rank term + bias; returns the column sums that ``base.factor`` asks for.

    ``h``: the base by itself, written if ``fused``, which computes it here, else read.
    """
    (M, N), R = out.shape, low.v.shape[1]
    x, w, w_by_column = (base.x, *by_column(base.weight)) if fused else (None, None, True)
    K, size, factor = x.shape[1] if fused else 0, out.element_size(), base.factor
    base_first = base.g is not None or h is not None or factor is not None
    drop, extra = low.drop.acts and R > 0, base_first or base.p is not None
    codes = fused and isinstance(base.weight, Quantised)
    if codes:
        config = s.config("decoding", configs.decoding(M, R, size, s.arch, s.batch_invariant), size)
        block_k, tma = config.block_k, False
    elif fused:
        config = configs.gemm(M, N, K, R, size, s.arch, drop=drop, extra=extra)
        config = s.config("gemm", config, size)
        block_k = config.block_k
        tma = config.tma and describable(x) and describable(w)
    else:
        config = s.config("epilogue", configs.epilogue(M, N, R, size, s.arch), size)
        block_k, tma = 16, False
    tiles = cdiv(M, config.block_m), cdiv(N, config.block_c)
    partial = torch.empty((tiles[0], N), dtype=torch.float32, device=out.device) if factor is not None else None
    v_terms, b_terms = expand_terms(out.dtype, low.b.dtype, low.g is not None)
    strides = dict(
        stride_out=row_stride(out), stride_base=row_stride(h) if h is not None else 0,
        stride_x=row_stride(x) if fused else 0, stride_w=row_stride(w) if fused and not codes else 0, stride_v=row_stride(low.v),
        stride_b_col=low.b.stride(0), stride_b_rank=low.b.stride(1),
        stride_factor=row_stride(factor) if factor is not None else 0,
    )  # fmt: skip
    if tma:
        x = descriptor(x, [config.block_m, block_k])
        w = descriptor(w, [config.block_c, block_k] if w_by_column else [block_k, config.block_c])
    args = dict(
        out=out, base=h, x=x, w=w, v=low.v, b=low.b, bias=bias, in_scale=base.p if fused else None, out_scale=base.g,
        d=low.d, column_scale=low.g, factor=factor, partial=partial, M=M, N=N, K=K, R=R, scaling=low.scaling,
        **strides, inverse_keep=low.drop.factor, **low.drop.args,
    )  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_c, BLOCK_K=block_k, RANK=config.rank, CHUNKS=cdiv(R, config.rank),
        V_TERMS=v_terms, B_TERMS=b_terms, GROUP=config.group, GEMM=fused, BASE_FIRST=base_first,
        SAVE_BASE=fused and h is not None, W_BY_COLUMN=w_by_column, TMA=tma, EVEN_K=K % block_k == 0,
        FLATTEN=config.flatten, R_ALIGN=configs.alignment(R, strides["stride_v"]),
        B_ALIGN=configs.alignment(strides["stride_b_col"]), PRECISION=s.precision,
    )  # fmt: skip
    programs = tiles[0] * tiles[1]
    grid = (min(programs, config.persistent) if config.persistent else programs,)
    launch.submit(launch.Launch(expand_kernel, grid, args, constants, config.warps, config.stages))
    return add_rows(partial) if partial is not None else None


def _scaled(t: Tensor, scale: Tensor | None) -> Tensor:
    return t if scale is None else (t * scale).to(t.dtype)


def owner(base: Base, s: Settings) -> str:
    """Who computes the base: one of ``configs.BASES``, or the identity, which nobody does."""
    if base.weight is None:
        return "identity"
    (M, K), N = base.x.shape, base.columns
    if isinstance(base.weight, Quantised):
        default = configs.base_of_codes(M, s.batch_invariant)
    else:
        default = configs.base_product(M, N, K, base.x.element_size(), s.arch, s.batch_invariant)
    return s.pick("base", default)


def linear(base: Base, low: LowRank, bias, s: Settings) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(g * base + low-rank term + bias, base if it is wanted, column sums of base * factor)."""
    x, (M, N), R = base.x, (base.x.shape[0], base.columns), low.v.shape[1]
    out = x.new_empty((M, N))
    if M == 0 or N == 0:
        sums = torch.zeros(N, dtype=torch.float32, device=x.device) if base.factor is not None else None
        return out, out.clone() if base.keep else None, sums
    who = owner(base, s)
    if who == "identity":
        return _onto_itself(out, base, low, bias, s)
    if who == "fused":
        h = x.new_empty((M, N)) if base.keep else None
        return out, h, expand(out, base, h, low, bias, True, s)
    h = times(_scaled(x, base.p), base.weight, s.arch)
    if low.join is not None:
        low.join()
    plain = base.g is None and not base.keep and base.factor is None and (bias is None or bias.dtype == x.dtype)
    delta = not low.drop.acts and low.g is None and low.b.dtype == x.dtype
    if plain and (R == 0 or (who == "addmm" and delta)):
        if bias is not None:
            h += bias
        if R > 0:
            h.addmm_(_scaled(low.v, low.d).to(x.dtype), low.b.t(), alpha=low.scaling)
        return h, None, None
    into = out if base.keep else h
    return into, h if base.keep else None, expand(into, base, h, low, bias, False, s)


def _onto_itself(out: Tensor, base: Base, low: LowRank, bias, s: Settings):
    # x is read where a product would be; both scales act on the same columns.
    p, g = base.p, base.g
    if p is not None:
        p = p.float()
        base = base._replace(g=p if g is None else p * g.float())
    sums = expand(out, base, base.x, low, bias, False, s)
    h = None
    if base.keep:
        h = base.x.clone() if p is None else _scaled(base.x, p)
    return out, h, sums if p is None or sums is None else sums * p


def forward(c: Forward, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """(y, u, h) of ``lora_linear_fwd``."""
    x, scales = rows_of(c.x), c.scales
    base = Base(x, c.weight, vector(scales.p_b), vector(scales.g_b), c.save_base)

    def down() -> Tensor:
        return shrink(x, c.lora_A, vector(scales.p_d), c.dropout, s)

    overlaps = owner(base, s) == "overlap" and x.shape[0] * base.columns > 0
    u, join = launch.beside(down, x.device) if overlaps else (down(), None)
    low = LowRank(u, c.lora_B, c.scaling, vector(scales.d), vector(scales.g_d), join=join)
    y, h, _ = linear(base, low, vector(c.bias), s)
    return y, u, h if c.save_base else x.new_empty(0)

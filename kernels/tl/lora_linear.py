"""The passes of lora_linear as launches: forward, adapter gradients, input gradient.

    y = g_b * ((x * p_b) W^T) + s * g_d * ((d * u) B^T) + bias,        u = (drop(x) * p_d) A^T

Tensors in, tensors out; the sizes and dtypes are those of ``peftkern.ops.lora_linear`` and have been checked there.
``Settings`` holds what the caller read from the device and from torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import configs, launch
from .adapter_grad import add_rows_kernel
from .configs import cdiv
from .dropout import threshold
from .expand import expand_kernel
from .shrink import add_blocks_kernel, shrink_kernel

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before host descriptors
    TensorDescriptor = None


@dataclass(frozen=True)
class Settings:
    """``arch``: 90 for sm_90, 0 when interpreted. ``allow_tf32``: torch's own switch for fp32 products.

    ``fixed``: answers that replace those of ``configs``, see ``configs.fixed``.
    """

    arch: int
    allow_tf32: bool = False
    batch_invariant: bool = False
    fixed: tuple[tuple[str, object], ...] = ()

    @property
    def precision(self) -> str:
        """How a product of fp32 tiles is computed."""
        return "tf32" if self.allow_tf32 else "ieee"

    def pick(self, name: str, default: object) -> object:
        """The fixed answer of that name, or the default."""
        return next((value for known, value in self.fixed if known == name), default)

    def config(self, name: str, default: configs.LaunchConfig, itemsize: int) -> configs.LaunchConfig:
        """``pick`` for a launch configuration. Raises ValueError if it is invalid here."""
        config = self.pick(name, default)
        reason = configs.reason_against(config, itemsize, self.arch)
        if reason is not None:
            raise ValueError(f"{name}={config} cannot be used: {reason}")
        return config


@dataclass(frozen=True)
class Dropout:
    """``seed`` None: no dropout."""

    p: float = 0.0
    seed: Tensor | None = None

    @property
    def args(self) -> dict:
        """Run-time arguments of a kernel that drops."""
        if self.seed is None:
            return dict(seed=None, threshold=0, inverse_keep=1.0)
        return dict(seed=self.seed, threshold=threshold(self.p), inverse_keep=1.0 / (1.0 - self.p))


def dropout(p: float, seed: Tensor | None) -> Dropout:
    """Dropout acts iff p > 0."""
    return Dropout(p, seed) if p > 0.0 else Dropout()


# Offsets within a tile of at most 128 rows are 32-bit.
MAX_ROW_STRIDE = 1 << 24


def rows_of(t: Tensor) -> Tensor:
    """``t`` (rows, columns) with unit stride along columns; copied if it has none, or rows absurdly far apart."""
    return t if (t.shape[1] <= 1 or t.stride(1) == 1) and t.stride(0) < MAX_ROW_STRIDE else t.contiguous()


def row_stride(t: Tensor) -> int:
    """Elements from one row to the next."""
    return t.stride(0) if t.shape[0] > 1 else t.shape[1]


def vector(t: Tensor | None) -> Tensor | None:
    """Unit stride."""
    return None if t is None else t.contiguous()


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


def shrink(
    x: Tensor, A: Tensor, in_scale: Tensor | None, drop: Dropout, s: Settings, factor: float = 1.0,
    rank_scale: Tensor | None = None, u: Tensor | None = None, partial: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """rank_scale * factor * (drop(x) * in_scale) A^T, fp32 (M, R); ``u`` and ``partial``: see ``add_blocks``."""
    (M, K), R = x.shape, A.shape[0]
    out = torch.empty((M, R), dtype=torch.float32, device=x.device)
    if M == 0 or R == 0:
        return out
    if K == 0:
        return out.zero_()
    config = configs.shrink(K, R, x.element_size(), s.arch)
    config = s.config("shrink", config, x.element_size())
    blocks = cdiv(K, config.block_k)
    groups = s.pick("shrink_groups", configs.shrink_groups(M, K, R, config))
    per = cdiv(blocks, groups)
    several = per < blocks or rank_scale is not None or partial is not None
    into = torch.empty((blocks, M, R), dtype=torch.float32, device=x.device) if several else out
    x_terms, a_terms = terms(x.dtype, A.dtype, in_scale is not None, s.allow_tf32)
    drop_args = drop.args
    factor *= drop_args.pop("inverse_keep")
    args = dict(
        u=into, x=x, a=A, in_scale=in_scale, M=M, K=K, R=R, stride_x=row_stride(x), stride_a_rank=A.stride(0),
        stride_a_k=A.stride(1), blocks_per_program=per, factor=factor, **drop_args,
    )  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m, BLOCK_K=config.block_k, RANK=config.rank, PARTIAL=several,
        X_TERMS=x_terms, A_TERMS=a_terms, R_ALIGN=configs.alignment(R), PRECISION=s.precision,
    )  # fmt: skip
    grid = (cdiv(M, config.block_m), cdiv(blocks, per), cdiv(R, config.rank))
    launch.submit(launch.Launch(shrink_kernel, grid, args, constants, config.warps, config.stages))
    if several:
        add_blocks(out, into, rank_scale, u, partial, factor)
    return out


ADD_ROWS = 64


def add_blocks(out: Tensor, parts: Tensor, rank_scale, u, partial, factor: float) -> None:
    """out = rank_scale * factor * sum of parts; ``partial`` takes column sums of (out without rank_scale) * u."""
    blocks, M, R = parts.shape
    rank = configs.rank_block(R)
    u = None if partial is None else u
    args = dict(out=out, parts=parts, rank_scale=rank_scale, u=u, partial=partial, M=M, R=R, blocks=blocks)
    grid = (cdiv(M, ADD_ROWS), cdiv(R, rank))
    constants = dict(BLOCK_M=ADD_ROWS, RANK=rank, R_ALIGN=configs.alignment(R))
    launch.submit(launch.Launch(add_blocks_kernel, grid, dict(args, factor=factor), constants, 4, 2))


def add_rows(parts: Tensor) -> Tensor:
    """Column sums of an fp32 matrix."""
    ranges, C = parts.shape
    if ranges == 1:
        return parts[0]
    out = torch.empty(C, dtype=torch.float32, device=parts.device)
    args = dict(out=out, parts=parts, C=C, ranges=ranges)
    launch.submit(launch.Launch(add_rows_kernel, (cdiv(C, 64),), args, dict(BLOCK_M=32, BLOCK_C=64), 4, 2))
    return out


def _descriptor(t: Tensor, block: list[int]):
    return TensorDescriptor(t, list(t.shape), [row_stride(t), 1], block)


def _describable(t: Tensor) -> bool:
    bytes_per_row = row_stride(t) * t.element_size()
    return t.data_ptr() % 16 == 0 and bytes_per_row % 16 == 0 and 0 not in t.shape and t.stride(1) == 1


@dataclass(frozen=True)
class LowRank:
    """scaling * (v * rank_scale) (b * column_scale)^T, dropped; b (out columns, R). ``join``: to call before v is read."""

    v: Tensor
    b: Tensor
    scaling: float = 1.0
    rank_scale: Tensor | None = None
    column_scale: Tensor | None = None
    drop: Dropout = Dropout()
    join: Callable[[], None] | None = None


def expand(
    out: Tensor, x: Tensor | None, w: Tensor | None, by_column: bool, low: LowRank, in_scale, out_scale, bias, base,
    save_base: bool, factor: Tensor | None, s: Settings,
) -> Tensor | None:  # fmt: skip
    """out = out_scale * base + low-rank term + bias; with ``x`` the base is (x * in_scale) w^T, else it is read.

    ``w``: (N, K) if ``by_column``, else (K, N), unit stride along its second axis. ``factor`` (M, N): column sums of
    base * factor are returned.
    """
    (M, N), R = out.shape, low.v.shape[1]
    fused, K = x is not None, 0 if x is None else x.shape[1]
    size = out.element_size()
    base_first = out_scale is not None or save_base or factor is not None or not fused
    drop, extra = low.drop.seed is not None and R > 0, base_first or in_scale is not None
    if fused:
        config = configs.gemm(M, N, K, R, size, s.arch, drop=drop, extra=extra)
        config = s.config("gemm", config, size)
        block_k = config.block_k
        tma = config.tma and TensorDescriptor is not None and _describable(x) and _describable(w)
    else:
        config = s.config("epilogue", configs.epilogue(M, N, R, size, s.arch), size)
        block_k, tma = 16, False
    tiles = cdiv(M, config.block_m), cdiv(N, config.block_c)
    partial = torch.empty((tiles[0], N), dtype=torch.float32, device=out.device) if factor is not None else None
    v_terms, b_terms = expand_terms(out.dtype, low.b.dtype, low.column_scale is not None)
    strides = dict(
        stride_out=row_stride(out), stride_base=row_stride(base) if base is not None else 0,
        stride_x=row_stride(x) if fused else 0, stride_w=row_stride(w) if fused else 0, stride_v=row_stride(low.v),
        stride_b_col=low.b.stride(0), stride_b_rank=low.b.stride(1),
        stride_factor=row_stride(factor) if factor is not None else 0,
    )  # fmt: skip
    if tma:
        x = _descriptor(x, [config.block_m, block_k])
        w = _descriptor(w, [config.block_c, block_k] if by_column else [block_k, config.block_c])
    args = dict(
        out=out, base=base, x=x, w=w, v=low.v, b=low.b, bias=bias, in_scale=in_scale, out_scale=out_scale,
        rank_scale=low.rank_scale, column_scale=low.column_scale, factor=factor, partial=partial, M=M, N=N, K=K, R=R,
        scaling=low.scaling, **strides, **low.drop.args,
    )  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_c, BLOCK_K=block_k, RANK=config.rank, CHUNKS=cdiv(R, config.rank),
        V_TERMS=v_terms, B_TERMS=b_terms, GROUP=config.group, GEMM=fused, BASE_FIRST=base_first, SAVE_BASE=save_base,
        W_BY_COLUMN=by_column, TMA=tma, EVEN_K=K % block_k == 0, FLATTEN=config.flatten,
        R_ALIGN=configs.alignment(R, strides["stride_v"]), B_ALIGN=configs.alignment(strides["stride_b_col"]),
        PRECISION=s.precision,
    )  # fmt: skip
    programs = tiles[0] * tiles[1]
    grid = (min(programs, config.persistent) if config.persistent else programs,)
    launch.submit(launch.Launch(expand_kernel, grid, args, constants, config.warps, config.stages))
    return add_rows(partial) if partial is not None else None


def _scaled(t: Tensor, scale: Tensor | None) -> Tensor:
    return t if scale is None else (t * scale).to(t.dtype)


def _by_column(w: Tensor) -> tuple[Tensor, bool]:
    """(matrix with unit stride along its second axis, whether it is ``w`` itself and not its transpose)."""
    if w.stride(1) != 1 and w.stride(0) == 1:
        return w.t(), False
    return rows_of(w), True


def owner(x: Tensor, weight: Tensor, s: Settings) -> str:
    """Who computes x weight^T: one of ``configs.BASES``."""
    (M, K), N = x.shape, weight.shape[0]
    default = configs.base_product(M, N, K, x.element_size(), s.arch, s.batch_invariant)
    return s.pick("base", default)


def linear(
    x: Tensor, weight: Tensor, low: LowRank, in_scale, out_scale, bias, keep_base: bool, factor, s: Settings
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out_scale * base + low-rank term + bias, base if ``keep_base``, column sums of base * factor).

    base = (x * in_scale) weight^T, weight (N, K). The product's owner is ``configs.base_product``.
    """
    M, N, R = x.shape[0], weight.shape[0], low.v.shape[1]
    w, by_column = _by_column(weight)
    out = x.new_empty((M, N))
    if M == 0 or N == 0:
        sums = torch.zeros(N, dtype=torch.float32, device=x.device) if factor is not None else None
        return out, out.clone() if keep_base else None, sums
    who = owner(x, weight, s)
    if who == "fused":
        base = x.new_empty((M, N)) if keep_base else None
        sums = expand(out, x, w, by_column, low, in_scale, out_scale, bias, base, keep_base, factor, s)
        return out, base, sums
    base = _scaled(x, in_scale) @ weight.t()
    if low.join is not None:
        low.join()
    plain = out_scale is None and not keep_base and factor is None and (bias is None or bias.dtype == x.dtype)
    delta = low.drop.seed is None and low.column_scale is None and low.b.dtype == x.dtype
    if plain and (R == 0 or (who == "addmm" and delta)):
        if bias is not None:
            base += bias
        if R > 0:
            base.addmm_(_scaled(low.v, low.rank_scale).to(x.dtype), low.b.t(), alpha=low.scaling)
        return base, None, None
    into = out if keep_base else base
    sums = expand(into, None, None, True, low, None, out_scale, bias, base, False, factor, s)
    return into, base if keep_base else None, sums


def forward(
    x, weight, lora_A, lora_B, bias, scaling: float, drop: Dropout, rank_scale, base_in_scale, delta_in_scale,
    base_out_scale, delta_out_scale, save_base: bool, s: Settings,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, u, h) of ``lora_linear_fwd``."""
    x = rows_of(x)

    def down() -> Tensor:
        return shrink(x, lora_A, vector(delta_in_scale), drop, s)

    overlaps = owner(x, weight, s) == "overlap" and x.shape[0] * weight.shape[0] > 0
    u, join = launch.beside(down, x.device) if overlaps else (down(), None)
    low = LowRank(u, lora_B, scaling, vector(rank_scale), vector(delta_out_scale), join=join)
    in_scale, out_scale = vector(base_in_scale), vector(base_out_scale)
    y, h, _ = linear(x, weight, low, in_scale, out_scale, vector(bias), save_base, None, s)
    return y, u, h if save_base else x.new_empty(0)


def backward_input(
    dy, du, x, weight, lora_A, drop: Dropout, base_in_scale, delta_in_scale, base_out_scale, need_base_in: bool,
    s: Settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx, dbase_in) of ``lora_linear_bwd_input``: the forward's kernel with W, A and B transposed."""
    low = LowRank(rows_of(du), lora_A.t(), 1.0, None, vector(delta_in_scale), drop)
    factor = rows_of(x) if need_base_in else None
    in_scale, out_scale = vector(base_out_scale), vector(base_in_scale)
    dx, _, sums = linear(rows_of(dy), weight.t(), low, in_scale, out_scale, None, False, factor, s)
    return dx, sums if need_base_in else du.new_empty(0)

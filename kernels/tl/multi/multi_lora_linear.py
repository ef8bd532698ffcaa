"""The passes of multi_lora_linear as launches: forward, adapter gradients, input gradient, and the branch alone.

    y_t = W x_t + s[a_t] B[a_t] u_t + bias,        u_t = A[a_t] drop(x_t)

Tensors in, tensors out, as in ``peftkern.ops.multi_lora_linear``, where they have been checked. Nothing here reads a
tensor: grids come from sizes, and what the route says is read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .. import configs, launch
from ..call import Settings
from ..configs import cdiv
from ..lora_linear import Base, LowRank, expand_terms, linear, terms
from ..operand import by_column, row_stride, rows_of, vector
from . import configs as multi_configs
from .adapter_grad import multi_adapter_grad_kernel, multi_finish_kernel
from .expand import multi_expand_kernel
from .route import addresses_of
from .shrink import multi_add_spans_kernel, multi_shrink_kernel

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Adapters(NamedTuple):
    """The adapters of a call and which rows are whose, as in ``peftkern.ops.multi_lora_linear``."""

    weights: list[Tensor]
    table: Tensor
    scaling: Tensor | None
    max_rank: int
    order: Tensor
    starts: Tensor
    dropout_p: Tensor | None = None
    seed: Tensor | None = None


class Onto(NamedTuple):
    """What the branch of a (M, K) is added to: a weight^T, weight (N, K); a itself; or zero. ``columns``: N."""

    columns: int
    weight: Tensor | None = None
    identity: bool = False


@dataclass(frozen=True)
class Batch:
    """What all kernels of a call share. ``dtype``: of the adapters. ``rank_fast_b``: how their B are expected to lie."""

    addresses: Tensor
    tensors: int
    dtype: torch.dtype
    rank_fast_b: bool
    table: Tensor
    scaling: Tensor | None
    order: Tensor
    starts: Tensor
    max_rank: int
    dropout_p: Tensor | None
    seed: Tensor | None
    s: Settings

    @property
    def slots(self) -> int:
        """Rows of the table."""
        return self.table.shape[0]

    @property
    def weights(self) -> dict:
        """Arguments of a kernel that reads adapters."""
        return dict(addresses=self.addresses, tensors=self.tensors)

    @property
    def route(self) -> dict:
        """Arguments of every kernel that takes tiles or segments."""
        return dict(starts=self.starts, table=self.table, M=self.order.shape[0], slots=self.slots)

    def drop(self, side_b: bool) -> dict:
        """Arguments of a kernel that drops, which is at A's side."""
        acts = not side_b and self.dropout_p is not None
        return dict(dropout_p=self.dropout_p if acts else None, seed=self.seed if acts else None)

    def scale(self, side_b: bool) -> Tensor | None:
        """The adapters' scaling, which acts at B's side."""
        return self.scaling if side_b else None

    def matrix(self, side_b: bool) -> dict:
        """Constants of a kernel that reads or writes adapters."""
        return dict(SIDE_B=side_b, RANK_FAST=side_b and self.rank_fast_b, DTYPE=_TRITON[self.dtype])

    def tiles(self, rows: int) -> tuple[int, dict]:
        """(tile numbers, constants of a kernel that takes tiles of so many rows)."""
        numbers, by_row = multi_configs.tile_numbers(self.order.shape[0], self.slots, rows)
        return numbers, dict(BLOCK_M=rows, BY_ROW=by_row, SEARCH=multi_configs.search_block(self.slots))


def batch(given: Adapters, like: Tensor, s: Settings) -> Batch:
    """The batch of a call; ``like``: x or dy."""
    weights = list(given.weights)
    return Batch(
        addresses_of(weights, like.device, keep=True), len(weights), weights[0].dtype if weights else like.dtype,
        any(w.dim() > 1 for w in weights), given.table.contiguous(), vector(given.scaling), given.order.contiguous(),
        given.starts.contiguous(), given.max_rank, vector(given.dropout_p), given.seed, s,
    )  # fmt: skip


def shrink(b: Batch, side_b: bool, x: Tensor) -> Tensor:
    """(M, max_rank) fp32: dropped x times each row's A^T; or with ``side_b`` x times its B and its scaling."""
    (M, C), R = x.shape, b.max_rank
    out = torch.empty((M, R), dtype=torch.float32, device=x.device)
    if M == 0 or R == 0:
        return out
    config = multi_configs.shrink(R, x.element_size(), b.dtype.itemsize, b.s.arch)
    config = b.s.config("multi_shrink", config, x.element_size())
    spans, each = multi_configs.spans(C, config.block_k)
    partial = spans > 1 and b.s.pick("multi_partial", multi_configs.partial(M, R, config))
    into = torch.empty((spans, M, R), dtype=torch.float32, device=x.device) if partial else out
    x_terms, a_terms = terms(x.dtype, b.dtype, False, b.s.allow_tf32)
    numbers, tiles = b.tiles(config.block_m)
    chunks = cdiv(R, config.rank)
    scaling, align = b.scale(side_b), configs.alignment(R)
    args = dict(
        u=into, x=x, order=b.order, scaling=scaling, C=C, MAX_RANK=R, stride_x=row_stride(x), **b.weights, **b.route,
        **b.drop(side_b),
    )  # fmt: skip
    constants = dict(
        tiles, BLOCK_K=config.block_k, BLOCK_R=config.rank, SPAN=each, PARTIAL=partial, **b.matrix(side_b),
        X_TERMS=x_terms, A_TERMS=a_terms, R_ALIGN=align, PRECISION=b.s.precision,
    )  # fmt: skip
    grid = (numbers, spans if partial else 1, chunks)
    launch.submit(launch.Launch(multi_shrink_kernel, grid, args, constants, config.warps, config.stages))
    if partial:
        args = dict(
            u=out, parts=into, order=b.order, scaling=scaling, dropout_p=b.drop(side_b)["dropout_p"], MAX_RANK=R,
            spans=spans, **b.route,
        )  # fmt: skip
        constants = dict(tiles, BLOCK_R=config.rank, R_ALIGN=align)
        launch.submit(launch.Launch(multi_add_spans_kernel, (numbers, chunks), args, constants, 4, 2))
    return out


class Product(NamedTuple):
    """x w^T with w (N, K) if ``w_by_column``, else (K, N)."""

    x: Tensor
    w: Tensor
    w_by_column: bool


def expand(
    b: Batch, side_b: bool, out: Tensor, base: Tensor | None, v: Tensor, bias: Tensor | None, inside: Product | None = None
) -> None:
    """out = base + branch + bias, where the base is read, is zero, or is a product computed ``inside`` the kernel."""
    (M, N), R = out.shape, b.max_rank
    if M == 0 or N == 0:
        return
    x, w, w_by_column = inside or (None, None, True)
    fused, K, size = x is not None, 0 if x is None else x.shape[1], out.element_size()
    if fused:
        config = multi_configs.gemm(R, b.s.arch, drop=not side_b and b.dropout_p is not None)
        config = b.s.config("multi_gemm", config, size)
    else:
        config = b.s.config("multi_expand", multi_configs.expand(R, size, b.s.arch), size)
    per = 1 if fused else b.s.pick("multi_columns", multi_configs.columns_per_program(M, N, config))
    numbers, tiles = b.tiles(config.block_m)
    v_terms, b_terms = expand_terms(out.dtype, b.dtype, False)
    block_k = config.block_k if fused else 16
    in_place = base is not None and base is out
    args = dict(
        out=out, base=base, x=x, w=w, v=v, order=b.order, scaling=b.scale(side_b),
        bias=bias, N=N, K=K, MAX_RANK=R, numbers=numbers, columns_per_program=per, stride_out=row_stride(out),
        stride_base=0 if base is None else row_stride(base), stride_x=row_stride(x) if fused else 0,
        stride_w=row_stride(w) if fused else 0, stride_v=row_stride(v), **b.weights, **b.route, **b.drop(side_b),
    )  # fmt: skip
    constants = dict(
        tiles, BLOCK_N=config.block_c, BLOCK_K=block_k, BLOCK_R=config.rank, GROUP=config.group, GEMM=fused,
        IN_PLACE=in_place, W_BY_COLUMN=w_by_column, EVEN_K=K % block_k == 0, **b.matrix(side_b), V_TERMS=v_terms,
        B_TERMS=b_terms, V_ALIGN=configs.alignment(R, args["stride_v"]), PRECISION=b.s.precision,
    )  # fmt: skip
    grid = (numbers * cdiv(cdiv(N, config.block_c), per),)
    launch.submit(launch.Launch(multi_expand_kernel, grid, args, constants, config.warps, config.stages))


def onto_base(b: Batch, side_b: bool, a: Tensor, base: Onto, v: Tensor, bias) -> Tensor:
    """(M, columns) in the dtype of ``a``: base + branch + bias."""
    (M, K), N, bias, weight = a.shape, base.columns, vector(bias), base.weight
    if weight is None or M == 0 or N == 0:
        out = a.new_empty((M, N))
        expand(b, side_b, out, a if base.identity else None, v, bias)
        return out
    owner = multi_configs.base(M, N, K, b.slots, a.element_size(), b.s.arch, b.s.batch_invariant)
    owner = b.s.pick("multi_base", owner)
    if owner == "fused":
        out = a.new_empty((M, N))
        expand(b, side_b, out, None, v, bias, Product(a, *by_column(weight)))
        return out
    if owner == "own":
        nothing = LowRank(a.new_empty((M, 0), dtype=torch.float32), a.new_empty((N, 0)))
        out, _, _ = linear(Base(a, weight), nothing, bias, replace(b.s, batch_invariant=True))
        bias = None
    else:
        out = a @ weight.t()
    expand(b, side_b, out, out, v, bias)
    return out


def forward(b: Batch, x: Tensor, base: Onto, bias) -> tuple[Tensor, Tensor]:
    """(y, u) of ``multi_lora_linear_fwd``."""
    x = rows_of(x)
    u = shrink(b, False, x)
    return onto_base(b, True, x, base, u, bias), u


def add(b: Batch, out: Tensor, x: Tensor) -> None:
    """``sgmv_add``: the branch onto ``out``, in place."""
    u = shrink(b, False, rows_of(x))
    into = out if out.shape[1] <= 1 or out.stride(1) == 1 else out.contiguous()
    expand(b, True, into, into, u, None)
    if into is not out:
        out.copy_(into)


def _grads(b: Batch, side_b: bool, grads: Tensor, t: Tensor, v: Tensor) -> None:
    # Gradients of all A or all B, to where ``grads`` (addresses) says.
    (M, C), R, size = t.shape, b.max_rank, t.element_size()
    if M == 0 or C == 0 or R == 0 or b.slots == 0:
        return
    config = b.s.config("multi_grad", multi_configs.grad(R, size, b.s.arch), size)
    ranges, places = b.s.pick("multi_ranges", configs.grad_ranges(M, C, R, config))
    parts = None
    if ranges > 1:
        parts = torch.empty((ranges, 2, C, R), dtype=torch.float32, device=t.device)
    drop, scaling = b.drop(side_b), b.scale(side_b)
    t_terms, v_terms = terms(t.dtype, b.dtype, True, b.s.allow_tf32)
    shared = dict(
        addresses=grads, tensors=b.tensors, parts=parts, scaling=scaling, C=C, MAX_RANK=R, places_per_program=places, **b.route,
    )  # fmt: skip
    constants = dict(b.matrix(side_b), SEARCH=multi_configs.search_block(b.slots), V_ALIGN=configs.alignment(R))
    args = dict(shared, t=t, v=v, order=b.order, stride_t=row_stride(t), stride_v=row_stride(v), **drop)
    more = dict(
        BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_R=config.rank, T_TERMS=t_terms, V_TERMS=v_terms,
        PRECISION=b.s.precision,
    )  # fmt: skip
    grid = (cdiv(C, config.block_c), ranges, cdiv(R, config.rank))
    taken = launch.Launch(multi_adapter_grad_kernel, grid, args, constants | more, config.warps, config.stages)
    launch.submit(taken)
    if ranges > 1:
        args = dict(shared, dropout_p=drop["dropout_p"])
        more = dict(BLOCK_C=32, BLOCK_R=configs.rank_block(R, 32))
        grid = (ranges - 1, cdiv(C, 32))
        launch.submit(launch.Launch(multi_finish_kernel, grid, args, constants | more, 4, 2))


def backward_adapter(
    b: Batch, dy: Tensor, x: Tensor | None, u: Tensor, weights, need: list[bool], need_bias: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(du, dbias, gradients like weights) of ``multi_lora_linear_bwd_adapter``."""
    dy = rows_of(dy)
    du = shrink(b, True, dy)
    grads = [torch.empty_like(w) if n else w.new_empty(0) for w, n in zip(weights, need, strict=True)]
    if any(need):
        torch._foreach_zero_([g for g in grads if g.numel() > 0] or grads[:1])
        where = addresses_of(grads, dy.device, keep=False)
        _grads(b, True, where, dy, u.contiguous())
        if x is not None:
            _grads(b, False, where, rows_of(x), du)
    dbias = dy.sum(0, dtype=torch.float32) if need_bias else u.new_empty(0)
    return du, dbias, grads


def backward_input(b: Batch, dy: Tensor, du: Tensor, base: Onto) -> Tensor:
    """dx of ``multi_lora_linear_bwd_input``; ``base``: the forward's weight, but columns of dx."""
    weight = None if base.weight is None else base.weight.t()
    return onto_base(b, False, rows_of(dy), base._replace(weight=weight), du.contiguous(), None)

"""The passes of multi_lora_linear as launches: forward, adapter gradients, input gradient, and the branch alone.

    y_t = g_b[a] * Base(x_t * p_b[a]) + s[a] g_d[a] * ((d[a] * u_t) B[a]^T) + beta[a],     u_t = (drop(x_t) * p_d[a]) A[a]^T

Tensors in, tensors out, as in ``peftkern.ops.multi_lora_linear``, where they have been checked. Nothing here reads a
tensor: grids come from sizes, and what the route says is read on the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import configs, launch
from ..configs import cdiv
from ..lora_linear import Base, LowRank, expand_terms, linear, terms
from ..operand import by_column, row_stride, rows_of, vector
from ..quantised.codes import Quantised
from ..quantised.panels import times
from . import configs as multi_configs
from .adapter_grad import multi_adapter_grad_kernel, multi_finish_kernel
from .batch import Adapters, Batch
from .expand import multi_expand_kernel
from .route import addresses_of
from .shrink import multi_add_spans_kernel, multi_shrink_kernel
from .vectors import VectorGrads, own_bias, scale_rows


class Onto(NamedTuple):
    """What the branch of a (M, K) is added to: a weight^T, weight (N, K) dense or in codes; a itself; or zero. ``columns``: N."""

    columns: int
    weight: Tensor | Quantised | None = None
    identity: bool = False


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
    x_terms, a_terms = terms(x.dtype, b.dtype, b.columns(side_b), b.s.allow_tf32)
    numbers, tiles = b.tiles(config.block_m)
    chunks = cdiv(R, config.rank)
    scaling, align = b.scale(side_b), configs.alignment(R)
    args = dict(
        u=into, x=x, order=b.order, scaling=scaling, C=C, MAX_RANK=R, stride_x=row_stride(x), **b.weights, **b.vectors,
        **b.route, **b.drop(side_b),
    )  # fmt: skip
    constants = dict(
        tiles, BLOCK_K=config.block_k, BLOCK_R=config.rank, SPAN=each, PARTIAL=partial, **b.matrix(side_b),
        COL=b.columns(side_b), X_TERMS=x_terms, A_TERMS=a_terms, R_ALIGN=align, PRECISION=b.s.precision,
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
    b: Batch,
    side_b: bool,
    out: Tensor,
    base: Tensor | None,
    v: Tensor,
    bias: Tensor | None,
    inside: Product | None = None,
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
        stride_w=row_stride(w) if fused else 0, stride_v=row_stride(v), **b.weights, **b.vectors, **b.route, **b.drop(side_b),
    )  # fmt: skip
    constants = dict(
        tiles, BLOCK_N=config.block_c, BLOCK_K=block_k, BLOCK_R=config.rank, GROUP=config.group, GEMM=fused,
        IN_PLACE=in_place, W_BY_COLUMN=w_by_column, EVEN_K=K % block_k == 0, **b.matrix(side_b), **b.branch(side_b),
        BASE=("g_b" if side_b else "p_b") in b.acting, OWN_BIAS=side_b and "beta" in b.acting, V_TERMS=v_terms,
        B_TERMS=b_terms, V_ALIGN=configs.alignment(R, args["stride_v"]), PRECISION=b.s.precision,
    )  # fmt: skip
    grid = (numbers * cdiv(cdiv(N, config.block_c), per),)
    launch.submit(launch.Launch(multi_expand_kernel, grid, args, constants, config.warps, config.stages))


def onto_base(
    b: Batch, side_b: bool, a: Tensor, base: Onto, v: Tensor, bias, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """((M, columns) in the dtype of ``a``: base + branch + bias, the base alone if it is to be kept apart)."""
    (M, K), N, bias, weight = a.shape, base.columns, vector(bias), base.weight
    into, scale = ("p_b", "g_b") if side_b else ("g_b", "p_b")
    if into in b.acting and (base.identity or weight is not None):
        a = scale_rows(b, into, a)
    if weight is None or M == 0 or N == 0:
        out = a.new_empty((M, N))
        expand(b, side_b, out, a if base.identity else None, v, bias)
        return out, a.clone() if base.identity and keep else out
    codes = isinstance(weight, Quantised)
    if codes:
        owner = "own" if configs.base_of_codes(M, b.s.batch_invariant) == "fused" else "vendor"
    else:
        owner = multi_configs.base(M, N, K, b.slots, a.element_size(), b.s.arch, b.s.batch_invariant)
    owner = b.s.pick("multi_base", owner)
    if owner == "fused" and not codes and not keep and scale not in b.acting:
        out = a.new_empty((M, N))
        expand(b, side_b, out, None, v, bias, Product(a, *by_column(weight)))
        return out, out
    if owner == "vendor":
        product, added = times(a, weight, b.s.arch), bias
    else:
        # The kernel adds a bias that all rows share.
        inside = bias if not keep and b.acting.isdisjoint((scale, "beta")) else None
        nothing = LowRank(a.new_empty((M, 0), dtype=torch.float32), a.new_empty((N, 0)))
        product, _, _ = linear(Base(a, weight), nothing, inside, replace(b.s, batch_invariant=True))
        added = None if inside is bias else bias
    out = torch.empty_like(product) if keep else product
    expand(b, side_b, out, product, v, added)
    return out, product


def forward(b: Batch, x: Tensor, base: Onto, bias, save_base: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(y, u, h) of ``multi_lora_linear_fwd``."""
    x = rows_of(x)
    u = shrink(b, False, x)
    y, h = onto_base(b, True, x, base, u, bias, save_base)
    return y, u, h if save_base else x.new_empty(0)


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
        addresses=grads, tensors=b.tensors, parts=parts, scaling=scaling, C=C, MAX_RANK=R, places_per_program=places,
        **b.vectors, **b.route,
    )  # fmt: skip
    constants = dict(
        **b.matrix(side_b), **b.branch(side_b), SEARCH=multi_configs.search_block(b.slots), V_ALIGN=configs.alignment(R)
    )  # fmt: skip
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


class Kept(NamedTuple):
    """What the forward pass has kept for gradients, each where one needs it."""

    x: Tensor | None
    u: Tensor
    h: Tensor | None


class Wanted(NamedTuple):
    """Of which tensors gradients are wanted."""

    x: bool
    bias: bool
    weights: list[bool]
    vectors: list[bool]


def backward(b: Batch, given: Adapters, dy: Tensor, kept: Kept, wanted: Wanted, base: Onto) -> tuple:
    """(dx, dbias, gradients like weights, gradients like vectors) of ``multi_lora_linear_bwd``.

    ``base``: the forward's weight, but columns of dx.
    """
    dy, u = rows_of(dy), kept.u.contiguous()
    x = None if kept.x is None else rows_of(kept.x)
    dv = shrink(b, True, dy)
    du = scale_rows(b, "d", dv) if "d" in b.acting else dv
    grads = _zeros(given.weights, wanted.weights)
    if any(wanted.weights):
        where = addresses_of(grads, dy.device, keep=False)
        _grads(b, True, where, dy, u)
        if x is not None:
            _grads(b, False, where, x, du)
    sums = _zeros(given.vectors, wanted.vectors)
    dx = dy.new_empty(0)
    if any(wanted.vectors):
        vectors = VectorGrads(b, addresses_of(sums, dy.device, keep=False))
        vectors.of_branch(dy, x, u, dv, du)
        vectors.column_sums("beta", dy)
        if kept.h is not None:
            vectors.column_sums("g_b", dy, kept.h)
    need_product = (
        any(wanted.vectors) and "p_b" in b.acting and x is not None and (base.identity or base.weight is not None)
    )
    if wanted.x or need_product:
        weight = None if base.weight is None else base.weight.t()
        dx, product = onto_base(b, False, dy, base._replace(weight=weight), du, None, need_product)
        if need_product:
            vectors.column_sums("p_b", product, x)
    return dx if wanted.x else dy.new_empty(0), _bias_grad(b, dy, u) if wanted.bias else u.new_empty(0), grads, sums


def _zeros(tensors: list[Tensor], wanted: list[bool]) -> list[Tensor]:
    grads = [torch.empty_like(t) if n else t.new_empty(0) for t, n in zip(tensors, wanted, strict=True)]
    if any(wanted):
        torch._foreach_zero_([g for g in grads if g.numel() > 0] or grads[:1])
    return grads


def _bias_grad(b: Batch, dy: Tensor, u: Tensor) -> Tensor:
    if "beta" in b.acting:
        dy = torch.where(own_bias(b)[:, None], dy.new_zeros(()), dy)
    return dy.sum(0, dtype=torch.float32)

"""multi_lora_linear: a frozen base with other scales and another low-rank branch for every row.

    y_t = g_b[a] * Base(x_t * p_b[a]) + s[a] g_d[a] * ((d[a] * z_t) B[a]^T) + beta[a],     z_t = f[a](u_t + b[a])
    u_t = (drop(x_t) * p_d[a]) A[a]^T

    x (M, K)   A[a] (R[a], K)   B[a] (N, R[a])   s (slots)   a = a_t the slot of row t, or base only: y_t = Base(x_t) + bias
    d, b (R[a]), p_b, p_d (K), g_b, g_d, beta (N): vectors that an adapter may have; without beta the layer's bias is added
    f: the activation that an adapter may have, of a bottleneck (peftkern/activations.py)

and its gradients, for the output gradient dy, with sums over the rows of an adapter and H[a] = sum_t dy_t^T (d[a] * z_t):

    dv_t = s[a] (g_d[a] * dy_t) B[a]       du_t = d[a] * dv_t * f[a]'(u_t + b[a])          db[a] = sum_t du_t
    dx_t = ((g_b[a] * dy_t) W) * p_b[a] + drop'((du_t A[a]) * p_d[a])
    dA[a] = sum_t du_t^T (drop(x_t) * p_d[a])                          dB[a] = s[a] g_d[a][:, None] * H[a]
    dd[a] = sum_t dv_t * z_t      dg_d[a] = s[a] rowdot(B[a], H[a])    dp_d[a] = coldot(A[a], sum_t du_t^T drop(x_t))
    dg_b[a] = sum_t dy_t * h_t    dp_b[a] = sum_t ((g_b[a] * dy_t) W) * x_t          dbeta[a] = sum_t dy_t

Without a base the branch is all there is: sgmv. u is (M, max_rank) in fp32, zero right of a row's rank.

Where an adapter's matrices and vectors lie is said by a table (adapter_table.py).

The *route* of a batch is made once for all layers: ``order`` (M) int32 lists the rows sorted by slot, stably, and
``starts`` (slots + 3) int32 holds where each slot's rows begin in it; after the slots come the rows that take the base
alone and, on devices that cannot raise without waiting, those with an invalid id, whose outputs are NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..bases.base import kind_of, operands
from ..checks import accumulate_dtype, check_fits, check_rows, check_tensor
from ..dispatch.registry import Size, define
from ..problem import Problem, problem_like
from .adapter_batch import check_dropout, check_route, check_vectors, check_weights
from .adapter_table import (
    A_TENSOR,
    ABSENT,
    ACTIVATION,
    AXES,
    B_TENSOR,
    BETA,
    COLUMNS,
    ID,
    RANK,
    RANK_BIAS,
    matrix_A,
    matrix_B,
    vector_column,
    vectors_at,
)  # fmt: skip
from .reference import dropped, times

# The kind of a base that is not there: the branch alone.
NO_BASE = "none"


class Route(NamedTuple):
    """Arguments of ``multi_lora_linear_route`` -> (order, starts)."""

    ids: Tensor
    table: Tensor
    mask: int


class MultiForward(NamedTuple):
    """Arguments of ``multi_lora_linear_fwd`` -> (y in x.dtype, u, h = Base(x * p_b) if ``save_base``).

    ``vectors``: in fp32 (fp64 for fp64); ``acting``: the symbols of those that some adapter has, with spaces between, and
    ``phi`` if one has an activation.
    h is in x.dtype, empty if not wanted.
    """

    x: Tensor
    base: list[Tensor]
    kind: str
    out_features: Size
    bias: Tensor | None
    weights: list[Tensor]
    table: Tensor
    scaling: Tensor
    max_rank: int
    order: Tensor
    starts: Tensor
    dropout_p: Tensor | None
    seed: Tensor | None
    vectors: list[Tensor] | None = None
    acting: str = ""
    save_base: bool = False


class MultiBackward(NamedTuple):
    """Arguments of ``multi_lora_linear_bwd`` -> (dx, dbias, gradients like ``weights``, gradients like ``vectors``).

    ``need``, ``need_vectors``: of which tensors gradients are wanted; what is not wanted comes back empty. dbias and the
    vectors' gradients are in fp32 (fp64 for fp64). x is read for dA, dp_b and dp_d alone, h for dg_b, u for dB, dd and
    dg_d, and for all of the branch where an adapter has an activation, the base for dx and dp_b.
    """

    dy: Tensor
    x: Tensor | None
    u: Tensor
    base: list[Tensor]
    kind: str
    in_features: Size
    weights: list[Tensor]
    table: Tensor
    scaling: Tensor
    order: Tensor
    starts: Tensor
    dropout_p: Tensor | None
    seed: Tensor | None
    need_x: bool
    need_bias: bool
    need: list[bool]
    vectors: list[Tensor] | None = None
    acting: str = ""
    h: Tensor | None = None
    need_vectors: list[bool] | None = None

    @property
    def wants_vectors(self) -> list[bool]:
        """``need_vectors``, one for each vector also where none is needed."""
        return self.need_vectors or [False] * len(self.vectors or ())


def multi_lora_linear_route_ref(c: Route) -> tuple[Tensor, Tensor]:
    """(order, starts). Slot of an id: ``id & mask``. On CPU an id that no slot answers to raises ValueError."""
    table, mask = c.table, c.mask
    ids, slots = c.ids.reshape(-1).to(torch.int64), table.shape[0]
    slot = (ids & mask).clamp(max=max(slots - 1, 0))
    known = (ids >= 0) & ((ids & mask) < slots)
    if slots:
        known &= table[:, ID][slot] == ids
    place = torch.where(known, slot, torch.where(ids == -1, slots, slots + 1))
    if ids.device.type == "cpu" and bool((place > slots).any()):
        bad = ids[place > slots][0].item()
        raise ValueError(f"adapter_ids holds {bad}, which is no adapter of the {slots} here (-1 means base only)")
    order = torch.sort(place, stable=True).indices.to(torch.int32)
    counts = torch.zeros(slots + 2, dtype=torch.int64, device=ids.device).index_add_(0, place, torch.ones_like(place))
    starts = torch.zeros(slots + 3, dtype=torch.int32, device=ids.device)
    starts[1:] = counts.cumsum(0)
    return order, starts


class _Segment(NamedTuple):
    """The rows of the batch that take one slot, that slot's row of the table, and its vectors by symbol."""

    slot: int
    row: list[int]
    rows: Tensor
    at: dict[str, Tensor | None]


def _segments(c: MultiForward | MultiBackward, K: int, N: int, acc: torch.dtype) -> Iterator[_Segment]:
    """Of every slot that has rows."""
    starts, order = c.starts.tolist(), c.order.to(torch.int64)
    for slot, row in enumerate(c.table.tolist()):
        if starts[slot] < starts[slot + 1]:
            at = vectors_at(c.vectors, row, {"R": row[RANK], "K": K, "N": N})
            at = {symbol: None if v is None else v.to(acc) for symbol, v in at.items()}
            yield _Segment(slot, row, order[starts[slot] : starts[slot + 1]], at)


def _invalid(table, order, starts) -> torch.Tensor:
    return order[starts[table.shape[0] + 1] :].to(torch.int64)


def _dropped(t: Tensor, rows: Tensor, slot: int, dropout_p: Tensor | None, seed: Tensor | None) -> Tensor:
    return dropped(t, 0.0 if dropout_p is None else dropout_p[slot].item(), seed, rows)


def _rows_times(t: Tensor, segments: list[_Segment], symbol: str) -> Tensor:
    """t (M, ...), each row times its adapter's vector of that symbol."""
    scaled = [s for s in segments if s.at[symbol] is not None]
    t = t.clone() if scaled else t
    for s in scaled:
        t[s.rows] *= s.at[symbol]
    return t


_NAMES = tuple(ACTIVATIONS)


def _activation(row: list[int], at: dict[str, Tensor | None], u: Tensor) -> tuple[Tensor, Tensor | None]:
    """(z, f' at its argument), or (u, None) of an adapter without an activation."""
    t = u if at[RANK_BIAS] is None else u + at[RANK_BIAS]
    f = ACTIVATIONS[_NAMES[row[ACTIVATION]]]
    return (f.value(t), f.slope(t)) if row[ACTIVATION] else (t, None)


def _base(kind: str, base: list[Tensor], t: Tensor, columns: int, transposed: bool) -> Tensor:
    """A fresh Base(t), or its transpose's, (M, columns)."""
    if kind == NO_BASE:
        return t.new_zeros((t.shape[0], columns))
    shape = (t.shape[1], columns) if transposed else (columns, t.shape[1])
    into, W = operands(kind, base, t, shape, transposed)
    return t.clone() if W is None else into @ (W if transposed else W.t())


def multi_lora_linear_fwd_ref(c: MultiForward) -> tuple[Tensor, Tensor, Tensor]:
    """(y, u, h); see ``MultiForward``."""
    acc, K, N = accumulate_dtype(c.x.dtype), c.x.shape[1], c.out_features
    xf, segments = c.x.to(acc), list(_segments(c, K, N, acc))
    h, u = _base(c.kind, c.base, _rows_times(xf, segments, "p_b"), N, False), xf.new_zeros((c.x.shape[0], c.max_rank))
    y = _rows_times(h.clone() if c.save_base else h, segments, "g_b")
    for slot, row, rows, at in segments:
        if row[RANK] == 0:
            continue
        kept = _dropped(xf[rows], rows, slot, c.dropout_p, c.seed)
        us = times(kept, at["p_d"]) @ matrix_A(c.weights, row, K).to(acc).t()
        u[rows, : row[RANK]] = us
        delta = times(_activation(row, at, us)[0], at["d"]) * c.scaling[slot] @ matrix_B(c.weights, row, N).to(acc).t()
        y[rows] += times(delta, at["g_d"])
    shared = torch.ones(y.shape[0], dtype=torch.bool, device=y.device)
    for s in segments:
        if s.at[BETA] is not None:
            y[s.rows] += s.at[BETA]
            shared[s.rows] = False
    if c.bias is not None:
        y[shared] += c.bias.to(acc)
    y[_invalid(c.table, c.order, c.starts)] = float("nan")
    return y.to(c.x.dtype), u, h.to(c.x.dtype) if c.save_base else c.x.new_empty(0)


def _wanted(c: MultiBackward, row: list[int]) -> set[str]:
    """The symbols of the vectors of an adapter of which gradients are wanted."""
    places = {symbol: row[vector_column(symbol)] for symbol in AXES}
    return {symbol for symbol, tensor in places.items() if tensor != ABSENT and c.wants_vectors[tensor]}


def multi_lora_linear_bwd_ref(c: MultiBackward) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """(dx, dbias, gradients of the weights, gradients of the vectors); see ``MultiBackward``."""
    acc, N, K = accumulate_dtype(c.dy.dtype), c.dy.shape[1], c.in_features
    dyf, segments = c.dy.to(acc), list(_segments(c, K, N, acc))
    grads = [torch.zeros_like(w) if n else w.new_empty(0) for w, n in zip(c.weights, c.need, strict=True)]
    sums = [torch.zeros_like(v) if n else v.new_empty(0) for v, n in zip(c.vectors or (), c.wants_vectors, strict=True)]
    wanted = {s.slot: _wanted(c, s.row) for s in segments}
    base, shared = None, torch.ones(dyf.shape[0], dtype=torch.bool, device=dyf.device)
    if c.need_x or any("p_b" in symbols for symbols in wanted.values()):
        base = _base(c.kind, c.base, _rows_times(dyf, segments, "g_b"), K, True)
    dx = _rows_times(base, segments, "p_b") if c.need_x else dyf.new_empty(0)
    for s in segments:
        found, dys = {}, dyf[s.rows]
        if s.row[RANK] > 0:
            found |= _branch_bwd(c, s, dx, grads)
        if "g_b" in wanted[s.slot]:
            found["g_b"] = (dys * c.h[s.rows].to(acc)).sum(0)
        if "p_b" in wanted[s.slot]:
            found["p_b"] = (base[s.rows] * c.x[s.rows].to(acc)).sum(0)
        if s.at[BETA] is not None:
            found[BETA], shared[s.rows] = dys.sum(0), False
        into = vectors_at(sums, s.row, {"R": s.row[RANK], "K": K, "N": N}, wanted[s.slot])
        for symbol in found.keys() & into.keys():
            into[symbol].copy_(found[symbol])
    if c.need_x:
        dx[_invalid(c.table, c.order, c.starts)] = float("nan")
    return dx.to(c.dy.dtype), dyf[shared].sum(0) if c.need_bias else c.u.new_empty(0), grads, sums


def _branch_bwd(c: MultiBackward, s: _Segment, dx: Tensor, grads: list[Tensor]) -> dict[str, Tensor]:
    """Adds to dx, fills what is needed of ``grads``; gradients of the branch's vectors by symbol."""
    (slot, row, rows, at), wanted = s, _wanted(c, s.row)
    dys, us = c.dy[rows].to(dx.dtype), c.u[rows, : row[RANK]]
    A, B = (m.to(dx.dtype) for m in (matrix_A(c.weights, row, c.in_features), matrix_B(c.weights, row, c.dy.shape[1])))
    z, slope = _activation(row, at, us)
    dv = times(dys, at["g_d"]) @ B * c.scaling[slot]
    du = times(times(dv, at["d"]), slope)
    found = {"d": (dv * z).sum(0), RANK_BIAS: du.sum(0)}
    if c.need[row[A_TENSOR]] or "p_d" in wanted:
        G = du.t() @ _dropped(c.x[rows].to(dx.dtype), rows, slot, c.dropout_p, c.seed)
        found["p_d"] = (A * G).sum(0)
        if c.need[row[A_TENSOR]]:
            matrix_A(grads, row, c.in_features).copy_(times(G, at["p_d"]))
    if c.need[row[B_TENSOR]] or "g_d" in wanted:
        H = dys.t() @ times(z, at["d"]) * c.scaling[slot]
        found["g_d"] = (B * H).sum(1)
        if c.need[row[B_TENSOR]]:
            matrix_B(grads, row, c.dy.shape[1]).copy_(times(H.t(), at["g_d"]).t())
    if c.need_x:
        dx[rows] += _dropped(times(du @ A, at["p_d"]), rows, slot, c.dropout_p, c.seed)
    return found


def _check_base(c: MultiForward | MultiBackward, like: Tensor, N: int, K: int) -> None:
    if c.kind != NO_BASE:
        kind_of(c.kind).check(c.base, like, K, N)


def _describe_route(c: Route) -> Problem:
    ids, table = c.ids, c.table
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"adapter_ids must be an int32 or int64 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}"
        )
    check_fits("table", table, (table.shape[0], len(COLUMNS)), "(slots, columns)", ids.device, (torch.int64,))
    return problem_like(ids, "multi_lora_linear_route", None, (ids.numel(), 0, 0, 0), {})


def describe_fwd(c: MultiForward) -> Problem:
    """The problem of checked arguments; raises for what does not fit."""
    x, N = c.x, c.out_features
    M, K = check_rows("x", x)
    _check_base(c, x, N, K)
    if c.bias is not None:
        check_fits("bias", c.bias, (N,), "(N,)", x.device, (x.dtype, torch.float32))
    slots = check_route(c.table, c.order, c.starts, M, x.device)
    check_fits("scaling", c.scaling, (slots,), "(slots,)", x.device, (accumulate_dtype(x.dtype),))
    dtype = check_weights(c.weights, x.dtype, x.device)
    check_dropout(c.dropout_p, c.seed, slots, x.device)
    present = {
        "base": c.kind != NO_BASE,
        "bias": c.bias,
        "dropout": c.dropout_p,
        "save_base": c.save_base,
        c.kind: c.kind not in ("dense", NO_BASE),
        **check_vectors(c.vectors, c.acting, accumulate_dtype(x.dtype), x.device),
    }
    return problem_like(x, "multi_lora_linear_fwd", dtype, (M, N, K, c.max_rank), present)


def _describe_bwd(c: MultiBackward) -> Problem:
    dy, acc, K = c.dy, accumulate_dtype(c.dy.dtype), c.in_features
    M, N = check_rows("dy", dy)
    check_tensor("u", c.u, dtypes=(acc,))
    check_fits("u", c.u, (M, c.u.shape[-1]), "(M, max_rank)", dy.device, (acc,))
    if c.x is not None:
        check_fits("x", c.x, (M, K), "(M, K)", dy.device, (dy.dtype,))
    if c.h is not None:
        check_fits("h", c.h, (M, N), "(M, N)", dy.device, (dy.dtype,))
    # Of the vectors' gradients p_b's alone reads the base, and only the table tells which vector is one.
    base = c.need_x or (any(c.wants_vectors) and len(c.base) > 0)
    if base:
        _check_base(c, dy, N, K)
    slots = check_route(c.table, c.order, c.starts, M, dy.device)
    check_fits("scaling", c.scaling, (slots,), "(slots,)", dy.device, (acc,))
    dtype = check_weights(c.weights, dy.dtype, dy.device)
    if len(c.need) != len(c.weights):
        raise ValueError(f"need has {len(c.need)} entries, expected {len(c.weights)}, one per tensor of weights")
    if len(c.wants_vectors) != len(c.vectors or ()):
        raise ValueError(
            f"need_vectors has {len(c.wants_vectors)} entries, expected {len(c.vectors or ())}, one per vector"
        )
    check_dropout(c.dropout_p, c.seed, slots, dy.device)
    present = {"base": c.kind != NO_BASE and base, "need_x": c.need_x, "need_weights": any(c.need)}
    present |= {"need_bias": c.need_bias, "dropout": c.dropout_p, c.kind: c.kind not in ("dense", NO_BASE)}
    present |= {"need_vectors": any(c.wants_vectors)} | check_vectors(c.vectors, c.acting, acc, dy.device)
    return problem_like(dy, "multi_lora_linear_bwd", dtype, (M, N, K, c.u.shape[1]), present)


def _fake_route(c: Route):
    _describe_route(c)
    starts = c.ids.new_empty(c.table.shape[0] + 3, dtype=torch.int32)
    return c.ids.new_empty(c.ids.numel(), dtype=torch.int32), starts


def _fake_fwd(c: MultiForward):
    p = describe_fwd(c)
    u = c.x.new_empty((p.M, p.R), dtype=accumulate_dtype(c.x.dtype))
    return c.x.new_empty((p.M, p.N)), u, c.x.new_empty((p.M, p.N) if c.save_base else 0)


def _fake_bwd(c: MultiBackward):
    p = _describe_bwd(c)
    grads = [torch.empty_like(w) if n else w.new_empty(0) for w, n in zip(c.weights, c.need, strict=True)]
    sums = [torch.empty_like(v) if n else v.new_empty(0) for v, n in zip(c.vectors or (), c.wants_vectors, strict=True)]
    return c.dy.new_empty((p.M, p.K) if c.need_x else 0), c.u.new_empty(p.N if c.need_bias else 0), grads, sums


def rank_rows(p: Problem, table, starts) -> int:
    """The sum over all rows of their adapter's rank; of tensors without values, what it can be at most."""
    if type(starts) is not Tensor or starts.is_meta:
        return p.M * p.R
    slots = table.shape[0]
    return int((table[:, RANK] * starts[: slots + 1].diff()).sum())


def _flops_fwd(p: Problem, c: MultiForward) -> int:
    base = p.M * p.N * p.K if "base" in p.flags else 0
    return 2 * (base + rank_rows(p, c.table, c.starts) * (p.K + p.N))


def _flops_bwd(p: Problem, c: MultiBackward) -> int:
    # du, then dA, dB and dx where they are wanted.
    columns = p.N + (p.K if any(c.need[::2]) else 0) + (p.N if any(c.need[1::2]) else 0) + (p.K if c.need_x else 0)
    base = p.M * p.N * p.K if "base" in p.flags else 0
    return 2 * (base + rank_rows(p, c.table, c.starts) * columns)


define(
    "multi_lora_linear_route",
    Route,
    "(Tensor, Tensor)",
    reference=multi_lora_linear_route_ref,
    fake=_fake_route,
    describe=_describe_route,
)
define(
    "multi_lora_linear_fwd",
    MultiForward,
    "(Tensor, Tensor, Tensor)",
    reference=multi_lora_linear_fwd_ref,
    fake=_fake_fwd,
    describe=describe_fwd,
    flops=_flops_fwd,
)
define(
    "multi_lora_linear_bwd",
    MultiBackward,
    "(Tensor, Tensor, Tensor[], Tensor[])",
    reference=multi_lora_linear_bwd_ref,
    fake=_fake_bwd,
    describe=_describe_bwd,
    flops=_flops_bwd,
)

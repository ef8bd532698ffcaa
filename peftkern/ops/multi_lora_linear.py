"""multi_lora_linear: a frozen linear layer with another low-rank branch for every row.

    y_t = W x_t + s[a_t] B[a_t] u_t + bias,        u_t = A[a_t] drop(x_t)

    x (M, K)   W weight (N, K)   A[a] (R[a], K)   B[a] (N, R[a])   s (slots)   a_t the slot of row t, or base only

and its gradients, for the output gradient dy:

    du_t = s[a_t] dy_t B[a_t]          dx_t = dy_t W + drop'(du_t A[a_t])
    dA[a] = sum_{t: a_t = a} du_t^T drop(x_t)        dB[a] = s[a] sum_{t: a_t = a} dy_t^T u_t

Without W (and bias) the branch is all there is: sgmv. u is (M, max_rank) in fp32, zero right of a row's rank.

Adapters arrive as a list of tensors, ``weights``, and an int64 table that says where each slot's A and B lie in them
(the columns below), so that a list of matrices and a bank with many adapters in one tensor are the same to a kernel.

The *route* of a batch is made once for all layers: ``order`` (M) int32 lists the rows sorted by slot, stably, and
``starts`` (slots + 3) int32 holds where each slot's rows begin in it; after the slots come the rows that take the base
alone and, on devices that cannot raise without waiting, those with an invalid id, whose outputs are NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..bases.base import kind_of
from ..checks import accumulate_dtype, check_fits, check_rows, check_tensor
from ..dispatch.registry import Size, define
from ..problem import Problem, problem_like
from .dropout_mask import check_seed, dropout_rows_ref

# Columns of a table row. Offsets and strides count elements from the tensor's first; A's columns are adjacent.
# PADDED: rows of A and of B^T are adjacent, and zeros follow them up to a multiple of 16 columns.
COLUMNS = ("ID", "RANK", "A_TENSOR", "A_OFFSET", "A_ROW", "B_TENSOR", "B_OFFSET", "B_N", "B_R", "PADDED")
ID, RANK, A_TENSOR, A_OFFSET, A_ROW, B_TENSOR, B_OFFSET, B_N, B_R, PADDED = range(len(COLUMNS))
FREE = -2  # the id of a slot without an adapter: no row may ask for it


# The kind of a base that is not there: the branch alone.
NO_BASE = "none"


class Route(NamedTuple):
    """Arguments of ``multi_lora_linear_route`` -> (order, starts)."""

    ids: Tensor
    table: Tensor
    mask: int


class MultiForward(NamedTuple):
    """Arguments of ``multi_lora_linear_fwd`` -> (y in x.dtype, u)."""

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


class MultiBackward(NamedTuple):
    """Arguments of ``multi_lora_linear_bwd`` -> (dx or empty, dbias in fp32 or empty, gradients like ``weights``).

    ``need``: of which weights gradients are wanted; those of the others come back empty.
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


def matrix_A(weights, row: list[int], in_features: int) -> torch.Tensor:
    """The view A (R, K) of the adapter in a table row."""
    return _view(weights[row[A_TENSOR]], row[A_OFFSET], (row[RANK], in_features), (row[A_ROW], 1))


def matrix_B(weights, row: list[int], out_features: int) -> torch.Tensor:
    """The view B (N, R) of the adapter in a table row."""
    return _view(weights[row[B_TENSOR]], row[B_OFFSET], (out_features, row[RANK]), (row[B_N], row[B_R]))


def _view(t: torch.Tensor, offset: int, size, stride) -> torch.Tensor:
    return t.as_strided(size, stride, t.storage_offset() + offset)


def _segments(table, order, starts):
    # (slot, its table row, the rows of the batch that take it) of every slot that has rows.
    starts, order = starts.tolist(), order.to(torch.int64)
    for slot, row in enumerate(table.tolist()):
        if starts[slot] < starts[slot + 1]:
            yield slot, row, order[starts[slot] : starts[slot + 1]]


def _invalid(table, order, starts) -> torch.Tensor:
    return order[starts[table.shape[0] + 1] :].to(torch.int64)


def _dropped(t, rows, slot: int, dropout_p, seed):
    p = 0.0 if dropout_p is None else dropout_p[slot].item()
    if p == 0.0:
        return t
    return torch.where(dropout_rows_ref(seed, rows, t.shape[1], p), t * (1.0 / (1.0 - p)), 0.0)


def _base(kind: str, base: list[Tensor], t: Tensor, columns: int, transposed: bool) -> Tensor:
    """A fresh Base(t), or its transpose's, (M, columns)."""
    if kind == NO_BASE:
        return t.new_zeros((t.shape[0], columns))
    W = kind_of(kind).dequantise(base, t.dtype)
    return t.clone() if W is None else t @ (W if transposed else W.t())


def multi_lora_linear_fwd_ref(c: MultiForward) -> tuple[Tensor, Tensor]:
    """(y, u); see ``MultiForward``."""
    acc, K, N = accumulate_dtype(c.x.dtype), c.x.shape[1], c.out_features
    xf = c.x.to(acc)
    y, u = _base(c.kind, c.base, xf, N, False), xf.new_zeros((c.x.shape[0], c.max_rank))
    for slot, row, rows in _segments(c.table, c.order, c.starts):
        us = _dropped(xf[rows], rows, slot, c.dropout_p, c.seed) @ matrix_A(c.weights, row, K).to(acc).t()
        u[rows, : row[RANK]] = us
        y[rows] += (us * c.scaling[slot]) @ matrix_B(c.weights, row, N).to(acc).t()
    if c.bias is not None:
        y += c.bias.to(acc)
    y[_invalid(c.table, c.order, c.starts)] = float("nan")
    return y.to(c.x.dtype), u


def multi_lora_linear_bwd_ref(c: MultiBackward) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(dx, dbias, gradients of the weights); see ``MultiBackward``."""
    acc, N, K = accumulate_dtype(c.dy.dtype), c.dy.shape[1], c.in_features
    dyf = c.dy.to(acc)
    dx = _base(c.kind, c.base, dyf, K, True) if c.need_x else dyf.new_empty(0)
    grads = [torch.zeros_like(w) if n else w.new_empty(0) for w, n in zip(c.weights, c.need, strict=True)]
    for slot, row, rows in _segments(c.table, c.order, c.starts):
        du = dyf[rows] @ matrix_B(c.weights, row, N).to(acc) * c.scaling[slot]
        if c.need[row[A_TENSOR]]:
            dropped = _dropped(c.x[rows].to(acc), rows, slot, c.dropout_p, c.seed)
            matrix_A(grads, row, K).copy_(du.t() @ dropped)
        if c.need[row[B_TENSOR]]:
            matrix_B(grads, row, N).copy_(dyf[rows].t() @ c.u[rows, : row[RANK]] * c.scaling[slot])
        if c.need_x:
            dx[rows] += _dropped(du @ matrix_A(c.weights, row, K).to(acc), rows, slot, c.dropout_p, c.seed)
    if c.need_x:
        dx[_invalid(c.table, c.order, c.starts)] = float("nan")
    return dx.to(c.dy.dtype), dyf.sum(0) if c.need_bias else c.u.new_empty(0), grads


def _check_route(table, order, starts, M: int, device: torch.device) -> int:
    check_tensor("table", table, dtypes=(torch.int64,))
    if table.dim() != 2 or table.shape[1] != len(COLUMNS):
        raise ValueError(f"table has shape {tuple(table.shape)}, expected (slots, {len(COLUMNS)})")
    slots = table.shape[0]
    check_fits("table", table, table.shape, "(slots, columns)", device, (torch.int64,))
    check_fits("order", order, (M,), "(M,)", device, (torch.int32,))
    check_fits("starts", starts, (slots + 3,), "(slots + 3,)", device, (torch.int32,))
    return slots


def _check_weights(weights, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    for i, w in enumerate(weights):
        check_tensor(f"weights[{i}]", w, dtypes=(dtype, torch.float32))
        if w.dtype != weights[0].dtype:
            raise TypeError(f"weights[{i}] has dtype {w.dtype}, expected {weights[0].dtype} like weights[0]")
        if w.device != device:
            raise ValueError(f"weights[{i}] is on {w.device}, expected {device}")
    return weights[0].dtype if weights else dtype


def _check_dropout(dropout_p, seed, slots: int, device: torch.device) -> None:
    if dropout_p is not None:
        check_fits("dropout_p", dropout_p, (slots,), "(slots,)", device, (torch.float64,))
        check_seed(seed, device)


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
    slots = _check_route(c.table, c.order, c.starts, M, x.device)
    check_fits("scaling", c.scaling, (slots,), "(slots,)", x.device, (accumulate_dtype(x.dtype),))
    dtype = _check_weights(c.weights, x.dtype, x.device)
    _check_dropout(c.dropout_p, c.seed, slots, x.device)
    present = {
        "base": c.kind != NO_BASE,
        "bias": c.bias,
        "dropout": c.dropout_p,
        c.kind: c.kind not in ("dense", NO_BASE),
    }
    return problem_like(x, "multi_lora_linear_fwd", dtype, (M, N, K, c.max_rank), present)


def _describe_bwd(c: MultiBackward) -> Problem:
    dy, acc, K = c.dy, accumulate_dtype(c.dy.dtype), c.in_features
    M, N = check_rows("dy", dy)
    check_tensor("u", c.u, dtypes=(acc,))
    check_fits("u", c.u, (M, c.u.shape[-1]), "(M, max_rank)", dy.device, (acc,))
    if c.x is not None:
        check_fits("x", c.x, (M, K), "(M, K)", dy.device, (dy.dtype,))
    if c.need_x:
        _check_base(c, dy, N, K)
    slots = _check_route(c.table, c.order, c.starts, M, dy.device)
    check_fits("scaling", c.scaling, (slots,), "(slots,)", dy.device, (acc,))
    dtype = _check_weights(c.weights, dy.dtype, dy.device)
    if len(c.need) != len(c.weights):
        raise ValueError(f"need has {len(c.need)} entries, expected {len(c.weights)}, one per tensor of weights")
    _check_dropout(c.dropout_p, c.seed, slots, dy.device)
    present = {"base": c.kind != NO_BASE and c.need_x, "need_x": c.need_x, "need_weights": any(c.need)}
    present |= {"need_bias": c.need_bias, "dropout": c.dropout_p, c.kind: c.kind not in ("dense", NO_BASE)}
    return problem_like(dy, "multi_lora_linear_bwd", dtype, (M, N, K, c.u.shape[1]), present)


def _fake_route(c: Route):
    _describe_route(c)
    starts = c.ids.new_empty(c.table.shape[0] + 3, dtype=torch.int32)
    return c.ids.new_empty(c.ids.numel(), dtype=torch.int32), starts


def _fake_fwd(c: MultiForward):
    p = describe_fwd(c)
    return c.x.new_empty((p.M, p.N)), c.x.new_empty((p.M, p.R), dtype=accumulate_dtype(c.x.dtype))


def _fake_bwd(c: MultiBackward):
    p = _describe_bwd(c)
    grads = [torch.empty_like(w) if n else w.new_empty(0) for w, n in zip(c.weights, c.need, strict=True)]
    return c.dy.new_empty((p.M, p.K) if c.need_x else 0), c.u.new_empty(p.N if c.need_bias else 0), grads


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
    "(Tensor, Tensor)",
    reference=multi_lora_linear_fwd_ref,
    fake=_fake_fwd,
    describe=describe_fwd,
    flops=_flops_fwd,
)
define(
    "multi_lora_linear_bwd",
    MultiBackward,
    "(Tensor, Tensor, Tensor[])",
    reference=multi_lora_linear_bwd_ref,
    fake=_fake_bwd,
    describe=_describe_bwd,
    flops=_flops_bwd,
)

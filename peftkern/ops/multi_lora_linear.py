"""multi_lora_linear: a frozen linear layer with another low-rank branch for every row.

    y_t = W x_t + s[a_t] B[a_t] u_t + bias,        u_t = A[a_t] drop(x_t)

    x (M, K)   W weight (N, K)   A[a] (R[a], K)   B[a] (N, R[a])   s (slots)   a_t the slot of row t, or base only

and its gradients, for the output gradient dy:

    du_t = s[a_t] dy_t B[a_t]          dx_t = dy_t W + drop'(du_t A[a_t])
    dA[a] = sum_{t: a_t = a} du_t^T drop(x_t)        dB[a] = s[a] sum_{t: a_t = a} dy_t^T u_t

Without W (and bias) the branch is all there is: sgmv. u and du are (M, max_rank) in fp32, zero right of a row's rank.

Adapters arrive as a list of tensors, ``weights``, and an int64 table that says where each slot's A and B lie in them
(the columns below), so that a list of matrices and a bank with many adapters in one tensor are the same to a kernel.

The *route* of a batch is made once for all layers: ``order`` (M) int32 lists the rows sorted by slot, stably, and
``starts`` (slots + 3) int32 holds where each slot's rows begin in it; after the slots come the rows that take the base
alone and, on devices that cannot raise without waiting, those with an invalid id, whose outputs are NaN.
"""

from __future__ import annotations

import torch

from ..dispatch.registry import define
from ..problem import Problem, device_arch
from .checks import accumulate_dtype, check_fits, check_tensor
from .dropout_mask import check_seed, dropout_rows_ref

# Columns of a table row. Offsets and strides count elements from the tensor's first; A's columns are adjacent.
# PADDED: rows of A and of B^T are adjacent, and zeros follow them up to a multiple of 16 columns.
COLUMNS = ("ID", "RANK", "A_TENSOR", "A_OFFSET", "A_ROW", "B_TENSOR", "B_OFFSET", "B_N", "B_R", "PADDED")
ID, RANK, A_TENSOR, A_OFFSET, A_ROW, B_TENSOR, B_OFFSET, B_N, B_R, PADDED = range(len(COLUMNS))
FREE = -2  # the id of a slot without an adapter: no row may ask for it


def multi_lora_linear_route_ref(ids, table, mask):
    """(order, starts). Slot of an id: ``id & mask``. On CPU an id that no slot answers to raises ValueError."""
    ids, slots = ids.reshape(-1).to(torch.int64), table.shape[0]
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


def multi_lora_linear_fwd_ref(
    x, weight, out_features, bias, weights, table, scaling, max_rank, order, starts, dropout_p, seed
):
    """(y in x.dtype, u)."""
    acc, K = accumulate_dtype(x.dtype), x.shape[1]
    xf = x.to(acc)
    y = xf.new_zeros((x.shape[0], out_features)) if weight is None else xf @ weight.to(acc).t()
    u = xf.new_zeros((x.shape[0], max_rank))
    for slot, row, rows in _segments(table, order, starts):
        us = _dropped(xf[rows], rows, slot, dropout_p, seed) @ matrix_A(weights, row, K).to(acc).t()
        u[rows, : row[RANK]] = us
        y[rows] += (us * scaling[slot]) @ matrix_B(weights, row, out_features).to(acc).t()
    if bias is not None:
        y += bias.to(acc)
    y[_invalid(table, order, starts)] = float("nan")
    return y.to(x.dtype), u


def multi_lora_linear_bwd_adapter_ref(
    dy, x, u, weights, table, scaling, order, starts, dropout_p, seed, need, need_bias
):
    """(du, dbias in fp32 or empty, gradients like ``weights``, those that are not needed empty)."""
    acc = accumulate_dtype(dy.dtype)
    dyf, du = dy.to(acc), torch.zeros_like(u)
    grads = [torch.zeros_like(w) if n else w.new_empty(0) for w, n in zip(weights, need, strict=True)]
    for slot, row, rows in _segments(table, order, starts):
        rank = row[RANK]
        ds = dyf[rows] @ matrix_B(weights, row, dy.shape[1]).to(acc) * scaling[slot]
        du[rows, :rank] = ds
        if need[row[A_TENSOR]]:
            dropped = _dropped(x[rows].to(acc), rows, slot, dropout_p, seed)
            matrix_A(grads, row, x.shape[1]).copy_(ds.t() @ dropped)
        if need[row[B_TENSOR]]:
            matrix_B(grads, row, dy.shape[1]).copy_(dyf[rows].t() @ u[rows, :rank] * scaling[slot])
    return du, dyf.sum(0) if need_bias else u.new_empty(0), grads


def multi_lora_linear_bwd_input_ref(dy, du, weight, in_features, weights, table, order, starts, dropout_p, seed):
    """dx in dy.dtype."""
    acc = accumulate_dtype(dy.dtype)
    dx = dy.new_zeros((dy.shape[0], in_features), dtype=acc) if weight is None else dy.to(acc) @ weight.to(acc)
    for slot, row, rows in _segments(table, order, starts):
        delta = du[rows, : row[RANK]] @ matrix_A(weights, row, in_features).to(acc)
        dx[rows] += _dropped(delta, rows, slot, dropout_p, seed)
    dx[_invalid(table, order, starts)] = float("nan")
    return dx.to(dy.dtype)


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


def _rows(name: str, t, columns: int | None = None) -> tuple[int, int]:
    check_tensor(name, t)
    if t.dim() != 2 or columns not in (None, t.shape[1]):
        raise ValueError(
            f"{name} has shape {tuple(t.shape)}, expected (M, {'columns' if columns is None else columns})"
        )
    return t.shape


def _problem(op: str, like, adapter_dtype, M: int, N: int, K: int, R: int, **present) -> Problem:
    device = like.device
    flags = frozenset(name for name, value in present.items() if value is not None and value is not False)
    return Problem(
        op, device.type, device_arch(device.type, device.index), like.dtype, adapter_dtype, M, N, K, R, flags
    )


def _describe_route(ids, table, mask) -> Problem:
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"adapter_ids must be an int32 or int64 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}"
        )
    check_fits("table", table, (table.shape[0], len(COLUMNS)), "(slots, columns)", ids.device, (torch.int64,))
    return _problem("multi_lora_linear_route", ids, None, ids.numel(), 0, 0, 0)


def _describe_fwd(
    x, weight, out_features, bias, weights, table, scaling, max_rank, order, starts, dropout_p, seed
) -> Problem:
    M, K = _rows("x", x)
    if weight is not None:
        check_fits("weight", weight, (out_features, K), "(N, K)", x.device, (x.dtype,))
    if bias is not None:
        check_fits("bias", bias, (out_features,), "(N,)", x.device, (x.dtype, torch.float32))
    slots = _check_route(table, order, starts, M, x.device)
    check_fits("scaling", scaling, (slots,), "(slots,)", x.device, (accumulate_dtype(x.dtype),))
    dtype = _check_weights(weights, x.dtype, x.device)
    _check_dropout(dropout_p, seed, slots, x.device)
    present = dict(base=weight, bias=bias, dropout=dropout_p)
    return _problem("multi_lora_linear_fwd", x, dtype, M, out_features, K, max_rank, **present)


def _describe_bwd_adapter(
    dy, x, u, weights, table, scaling, order, starts, dropout_p, seed, need, need_bias
) -> Problem:
    M, N = _rows("dy", dy)
    check_tensor("u", u, dtypes=(accumulate_dtype(dy.dtype),))
    check_fits("u", u, (M, u.shape[-1]), "(M, max_rank)", dy.device, (accumulate_dtype(dy.dtype),))
    K = 0
    if x is not None:
        check_fits("x", x, (M, x.shape[-1]), "(M, K)", dy.device, (dy.dtype,))
        K = x.shape[1]
    slots = _check_route(table, order, starts, M, dy.device)
    check_fits("scaling", scaling, (slots,), "(slots,)", dy.device, (accumulate_dtype(dy.dtype),))
    dtype = _check_weights(weights, dy.dtype, dy.device)
    if len(need) != len(weights):
        raise ValueError(f"need has {len(need)} entries, expected {len(weights)}, one per tensor of weights")
    _check_dropout(dropout_p, seed, slots, dy.device)
    present = dict(need_weights=any(need), need_bias=need_bias, dropout=dropout_p)
    return _problem("multi_lora_linear_bwd_adapter", dy, dtype, M, N, K, u.shape[1], **present)


def _describe_bwd_input(dy, du, weight, in_features, weights, table, order, starts, dropout_p, seed) -> Problem:
    M, N = _rows("dy", dy)
    check_tensor("du", du, dtypes=(accumulate_dtype(dy.dtype),))
    check_fits("du", du, (M, du.shape[-1]), "(M, max_rank)", dy.device, (accumulate_dtype(dy.dtype),))
    if weight is not None:
        check_fits("weight", weight, (N, in_features), "(N, K)", dy.device, (dy.dtype,))
    slots = _check_route(table, order, starts, M, dy.device)
    dtype = _check_weights(weights, dy.dtype, dy.device)
    _check_dropout(dropout_p, seed, slots, dy.device)
    present = dict(base=weight, dropout=dropout_p)
    return _problem("multi_lora_linear_bwd_input", dy, dtype, M, N, in_features, du.shape[1], **present)


def _fake_route(ids, table, mask):
    _describe_route(ids, table, mask)
    return ids.new_empty(ids.numel(), dtype=torch.int32), ids.new_empty(table.shape[0] + 3, dtype=torch.int32)


def _fake_fwd(*args):
    _describe_fwd(*args)
    x, out_features, max_rank = args[0], args[2], args[7]
    return x.new_empty((x.shape[0], out_features)), x.new_empty((x.shape[0], max_rank), dtype=accumulate_dtype(x.dtype))


def _fake_bwd_adapter(*args):
    _describe_bwd_adapter(*args)
    dy, u, weights, need, need_bias = args[0], args[2], args[3], args[10], args[11]
    grads = [torch.empty_like(w) if n else w.new_empty(0) for w, n in zip(weights, need, strict=True)]
    return torch.empty_like(u), u.new_empty(dy.shape[1] if need_bias else 0), grads


def _fake_bwd_input(*args):
    _describe_bwd_input(*args)
    return args[0].new_empty((args[0].shape[0], args[3]))


def rank_rows(p: Problem, table, starts) -> int:
    """The sum over all rows of their adapter's rank; of tensors without values, what it can be at most."""
    if type(starts) is not torch.Tensor or starts.is_meta:
        return p.M * p.R
    slots = table.shape[0]
    return int((table[:, RANK] * starts[: slots + 1].diff()).sum())


def _flops_fwd(p: Problem, *args) -> int:
    base = p.M * p.N * p.K if "base" in p.flags else 0
    return 2 * (base + rank_rows(p, args[5], args[9]) * (p.K + p.N))


def _flops_bwd_adapter(
    p: Problem, dy, x, u, weights, table, scaling, order, starts, dropout_p, seed, need, *args
) -> int:
    # du, then dA and dB of the tensors that want them. K is 0 without an x.
    ranks = rank_rows(p, table, starts)
    return 2 * ranks * (p.N + (p.K if any(need[::2]) else 0) + (p.N if any(need[1::2]) else 0))


def _flops_bwd_input(p: Problem, *args) -> int:
    base = p.M * p.N * p.K if "base" in p.flags else 0
    return 2 * (base + rank_rows(p, args[5], args[7]) * p.K)


define(
    "multi_lora_linear_route",
    "(Tensor ids, Tensor table, int mask) -> (Tensor, Tensor)",
    reference=multi_lora_linear_route_ref,
    fake=_fake_route,
    describe=_describe_route,
)
define(
    "multi_lora_linear_fwd",
    "(Tensor x, Tensor? weight, SymInt out_features, Tensor? bias, Tensor[] weights, Tensor table, Tensor scaling,"
    " int max_rank, Tensor order, Tensor starts, Tensor? dropout_p, Tensor? seed) -> (Tensor, Tensor)",
    reference=multi_lora_linear_fwd_ref,
    fake=_fake_fwd,
    describe=_describe_fwd,
    flops=_flops_fwd,
)
define(
    "multi_lora_linear_bwd_adapter",
    "(Tensor dy, Tensor? x, Tensor u, Tensor[] weights, Tensor table, Tensor scaling, Tensor order, Tensor starts,"
    " Tensor? dropout_p, Tensor? seed, bool[] need, bool need_bias) -> (Tensor, Tensor, Tensor[])",
    reference=multi_lora_linear_bwd_adapter_ref,
    fake=_fake_bwd_adapter,
    describe=_describe_bwd_adapter,
    flops=_flops_bwd_adapter,
)
define(
    "multi_lora_linear_bwd_input",
    "(Tensor dy, Tensor du, Tensor? weight, SymInt in_features, Tensor[] weights, Tensor table, Tensor order,"
    " Tensor starts, Tensor? dropout_p, Tensor? seed) -> Tensor",
    reference=multi_lora_linear_bwd_input_ref,
    fake=_fake_bwd_input,
    describe=_describe_bwd_input,
    flops=_flops_bwd_input,
)

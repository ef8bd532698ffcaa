"""multi_lora_linear and sgmv as differentiable functions.

Saved for backward, each only if a gradient that is needed reads it (``_reads``): x, or a copy of it where that costs less
(``saved.py``); u (M, max_rank) in fp32; parameters, the route and a seed. A bank's weights get no gradient; what they
were in forward stays readable until backward is done.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..bases.base import Base, base_of, kind_of
from ..checks import accumulate_dtype, check_tensor
from ..dispatch.registry import caller
from ..many.bank import AdapterBank
from ..many.route import route
from ..many.table import AdapterTable, probabilities, table_of
from ..ops.dropout_mask import check_p, seed_tensor
from ..ops.multi_lora_linear import NO_BASE
from .saved import kept_input, read_saved
from .shapes import as_shape, autocast_dtype, cast, no_transforms, rows_of

_fwd, _bwd = caller("multi_lora_linear_fwd"), caller("multi_lora_linear_bwd")
_add = caller("sgmv_add")
_BRANCH = Base(NO_BASE, ())
_SAVED = ("x", "u", "table", "scaling", "order", "starts", "dropout_p", "seed", "weight or an adapter's matrix")


@functools.cache
def _reads(needs: tuple[bool, ...], base: int) -> tuple[bool, ...]:
    """Which of ``_SAVED`` the needed gradients read: the base's tensors, then lora_A and lora_B of each adapter, last."""
    x, matrices = needs[0], needs[4 + base :]
    # A bank's tensors, which hold both, need no gradient.
    read = [x or (i % 2 == 1 and matrices[i - 1]) for i in range(len(matrices))]
    return any(matrices[::2]), any(matrices[1::2]), *[True] * 6, *[x] * base, *read


class Batch(NamedTuple):
    """What a pass takes besides x, dy and weights: which row takes which adapter, and how."""

    base: str
    state: AdapterTable
    order: Tensor
    starts: Tensor
    dropout_p: Tensor | None
    seed: Tensor | None
    dtype: torch.dtype

    def forward(self, x: Tensor, base: Sequence[Tensor], bias: Tensor | None, weights: Sequence[Tensor]):
        """(y, u) of x (..., K), already in ``dtype``."""
        state, tensors = self.state, kind_of(self.base).cast(base, self.dtype) if base else []
        y, u = _fwd(
            rows_of(x, self.dtype), tensors, self.base, state.out_features, bias, weights, state.table, state.scaling,
            state.max_rank, self.order, self.starts, self.dropout_p, self.seed,
        )  # fmt: skip
        return as_shape(y, x), u


class MultiLoRALinearFunction(torch.autograd.Function):
    """The op with its gradients. The base's tensors and the state's weights come last, flat: autograd sees no lists."""

    @staticmethod
    def forward(ctx, x, bias, batch, bases, *tensors):
        base, weights, state = tensors[:bases], tensors[bases:], batch.state
        given = cast(x, batch.dtype)
        y, u = batch.forward(given, base, bias, list(weights))
        saved = (x, u, state.table, state.scaling, batch.order, batch.starts, batch.dropout_p, batch.seed, *tensors)
        if not torch.compiler.is_compiling():  # a compiler drops what it does not need by itself
            read = _reads(ctx.needs_input_grad, bases)
            kept = kept_input(x, given) if read[0] else None
            saved = (kept, *[t if r else None for t, r in zip(saved[1:], read[1:], strict=True)])
        ctx.save_for_backward(*saved)
        # Held, so that the memory of a bank's removed adapters is not used again before backward.
        ctx.state, ctx.base, ctx.bases, ctx.dtype = state, batch.base, bases, batch.dtype
        ctx.x_shape, ctx.x_dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("multi_lora_linear has no second derivative: call backward without create_graph=True")
        bases, state = ctx.bases, ctx.state
        saved, needs = read_saved(ctx, "multi_lora_linear", _SAVED, lambda needs: _reads(needs, bases))
        x, u, table, scaling, order, starts, dropout_p, seed, *tensors = saved
        need_x, need_bias, need = needs[0], needs[1], list(needs[4 + bases :])
        dy = rows_of(dy, dy.dtype)
        if u is None:
            u = dy.new_empty((dy.shape[0], state.max_rank), dtype=accumulate_dtype(ctx.dtype))
        base = kind_of(ctx.base).cast(tensors[:bases], ctx.dtype) if bases and need_x else []
        # Of a matrix that no gradient reads an op uses the shape alone.
        weights = [known if w is None else w for w, known in zip(tensors[bases:], state.weights, strict=True)]
        dx, dbias, grads = _bwd(
            dy, None if x is None else rows_of(x, ctx.dtype), u, base, ctx.base, state.in_features, weights, table, scaling,
            order, starts, dropout_p, seed, need_x, need_bias, need,
        )  # fmt: skip
        dx = cast(dx.view(ctx.x_shape), ctx.x_dtype) if need_x else None
        grads = [g if n else None for g, n in zip(grads, need, strict=True)]
        return dx, cast(dbias, ctx.bias_dtype) if need_bias else None, None, None, *[None] * bases, *grads


def _state(adapters, x: Tensor, dtype: torch.dtype) -> AdapterTable:
    if type(adapters) is AdapterTable:
        return adapters  # of a list that the caller has checked against x
    if not isinstance(adapters, AdapterBank):
        return table_of(adapters, x, dtype)
    if adapters.device != x.device:
        raise ValueError(f"adapters is a bank on {adapters.device}, expected {x.device} like x")
    if adapters.in_features != x.shape[-1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {adapters.in_features}) as the bank has")
    if adapters.dtype not in (dtype, accumulate_dtype(dtype)):
        raise TypeError(f"adapters is a bank of {adapters.dtype}, expected {dtype} or {accumulate_dtype(dtype)}")
    return adapters.snapshot()


def _probabilities(dropout_p, training: bool, slots: int, device: torch.device) -> Tensor | None:
    """fp64 (slots,), or None if nothing is dropped."""
    each = dropout_p if isinstance(dropout_p, Sequence) else (dropout_p,)
    if each is dropout_p and len(each) != slots:
        raise ValueError(f"dropout_p has {len(each)} entries, expected one per adapter ({slots})")
    for p in each:
        check_p(p)
    if not training or not any(each):
        return None
    return probabilities(tuple(map(float, each)), 1 if each is dropout_p else slots, device)


def _call(x: Tensor, base: Base, bias: Tensor | None, batch: Batch) -> Tensor:
    weights = batch.state.weights
    # A trace records the op itself, which has no gradient.
    grad = torch.is_grad_enabled() and torch._C._get_tracing_state() is None
    if grad and any(t is not None and t.requires_grad for t in (x, bias, *weights)):
        return MultiLoRALinearFunction.apply(x, bias, batch, len(base.tensors), *base.tensors, *weights)
    return batch.forward(cast(x, batch.dtype), base.tensors, bias, _list(weights))[0]


def _list(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    # A compiler takes no other list than a plain one.
    return list(weights) if torch.compiler.is_compiling() else weights


def _check_x(x) -> None:
    check_tensor("x", x)
    if x.dim() < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., K)")


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | Base,
    adapters: Sequence[tuple[Tensor, Tensor, float]] | AdapterBank,
    adapter_ids: Tensor,
    *,
    bias: Tensor | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A frozen linear layer plus, for every row, the low-rank branch of that row's adapter.

        y_t = W x_t + s[a_t] B[a_t] A[a_t] drop(x_t) + bias

    Serves what punica's SGMV and HF PEFT's ``adapter_names`` serve, for any mix of ranks, and trains.

    Args:
        x: (..., K) in fp32, bf16 or fp16 (fp64 through the reference).
        weight: (N, K) in x's dtype. Frozen: it gets no gradient.
        adapters: ``(lora_A (R, K), lora_B (N, R), scaling)`` each, ranks of any mix, in fp32 or x's dtype (all alike, or
            they are taken in fp32); or an AdapterBank, whose weights get no gradient.
        adapter_ids: int32 or int64 on x's device: one per row of the flattened x, or one per leading index. -1 takes the
            base alone. A list's ids are its positions, a bank's come from ``bank.ids``.
        bias: (N).
        dropout_p: drop probability of the branch's input, one for all adapters or one each; acts if ``training``.
        seed: as in ``lora_linear``: bits depend on (seed, flattened row, column) alone.

    Returns:
        (..., N) in x's dtype, or the autocast dtype. A row's branch has the same bits whatever else is in the batch.

    Raises:
        ValueError, TypeError: an argument that does not fit, named in the message; on CPU an id that no adapter has.
            On a GPU the row of such an id is NaN.
        RuntimeError: a second derivative, or use under a torch.func transform; in backward as in ``lora_linear``.

    ``torch.jit.trace`` records the ops themselves: the trace takes any ids, needs this package and has no gradient.
    """
    no_transforms("multi_lora_linear")
    base = base_of(weight)
    _check_x(x)
    if torch.is_grad_enabled() and any(t.requires_grad for t in base.tensors):
        raise ValueError("weight requires grad, but gets no gradient here: freeze it with requires_grad_(False)")
    if bias is not None:
        check_tensor("bias", bias)
    autocast = autocast_dtype(x)
    dtype = autocast or x.dtype
    given = base.tensors if autocast is None else kind_of(base.kind).cast(base.tensors, dtype)
    N, _ = kind_of(base.kind).check(given, x if autocast is None else x.new_empty(0, dtype=dtype), x.shape[-1], None)
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected (N,) with N = {N}")
    if bias is not None and bias.dtype not in (dtype, torch.float32):
        bias = bias.to(dtype)
    state = _state(adapters, x, dtype)
    if N != state.out_features:
        raise ValueError(f"weight has {N} out_features, expected N = {state.out_features} as the adapters have")
    p = _probabilities(dropout_p, training, state.table.shape[0], x.device)
    seed = seed_tensor(seed, x.device) if p is not None else None
    return _call(x, base, bias, Batch(base.kind, state, *route(adapter_ids, x, state), p, seed, dtype))


def sgmv(
    x: Tensor,
    adapters: Sequence[tuple[Tensor, Tensor, float]] | AdapterBank,
    adapter_ids: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The branch alone, scaling included: ``y_t = s[a_t] B[a_t] A[a_t] x_t``; rows with id -1 are zero.

    Arguments as in ``multi_lora_linear``. With ``out`` (..., N), in x's dtype, the branch is added to it in place
    (one rounding) and it is returned; base-only rows keep their bits.

    Raises:
        ValueError, TypeError: as in ``multi_lora_linear``, and an ``out`` of another shape, dtype or device.
        RuntimeError: ``out`` where a gradient is required.
    """
    no_transforms("sgmv")
    _check_x(x)
    dtype = x.dtype if out is not None else autocast_dtype(x) or x.dtype
    state = _state(adapters, x, dtype)
    order, starts = route(adapter_ids, x, state)
    if out is None:
        return _call(x, _BRANCH, None, Batch(NO_BASE, state, order, starts, None, None, dtype))
    check_tensor("out", out)
    shape = (*x.shape[:-1], state.out_features)
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != x.device:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, expected {dtype} {shape} on {x.device}"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, out, *state.weights)):
        raise RuntimeError("sgmv(out=...) works in place and has no gradient: use multi_lora_linear, or no_grad")
    rows = out.view(-1, state.out_features) if out.dim() != 2 else out
    _add(rows, rows_of(x, dtype), _list(state.weights), state.table, state.scaling, state.max_rank, order, starts)
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # so that whoever saved it for a gradient notices
    return out

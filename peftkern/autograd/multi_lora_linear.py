"""multi_lora_linear and sgmv as differentiable functions.

Saved for backward, each only if a gradient that is needed reads it (``_reads``): x, or a copy of it where that costs less
(``saved.py``); u (M, max_rank) in fp32; parameters, the route and a seed. A bank's weights get no gradient; what they
were in forward stays readable until backward is done.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch.registry import caller
from ..many.bank import AdapterBank
from ..many.route import route
from ..many.table import AdapterTable, probabilities, table_of
from ..ops.checks import accumulate_dtype, check_tensor
from ..ops.dropout_mask import check_p, seed_tensor
from ..ops.lora_linear import check_base
from .lora_linear import _as_shape, _autocast_dtype, _cast, _rows
from .saved import kept_input, read_saved

_fwd, _bwd_adapter, _bwd_input = (caller(f"multi_lora_linear_{part}") for part in ("fwd", "bwd_adapter", "bwd_input"))
_add = caller("sgmv_add")


_SAVED = ("x", "weight", "u", "table", "scaling", "order", "starts", "dropout_p", "seed", "an adapter's matrix")


@functools.cache
def _reads(needs: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which of ``_SAVED`` the needed gradients read. The matrices come last, lora_A and lora_B of each adapter."""
    x, matrices = needs[0], needs[9:]
    # A bank's tensors, which hold both, need no gradient.
    read = [x or (i % 2 == 1 and matrices[i - 1]) for i in range(len(matrices))]
    return any(matrices[::2]), x, any(matrices[1::2]), *[True] * 6, *read


class MultiLoRALinearFunction(torch.autograd.Function):
    """The op with its gradients. ``state``: the AdapterTable, whose weights come again, flat, as the last arguments."""

    @staticmethod
    def forward(ctx, x, weight, bias, state, order, starts, dropout_p, seed, dtype, *weights):
        needs = ctx.needs_input_grad
        rows = _rows(x, dtype)
        y, u = _fwd(
            rows, None if weight is None else _cast(weight, dtype), state.out_features, bias, list(weights),
            state.table, state.scaling, state.max_rank, order, starts, dropout_p, seed,
        )  # fmt: skip
        if torch.compiler.is_compiling():
            kept, read = x, (True,) * (9 + len(weights))  # a compiler drops what it does not need by itself
        else:
            read = _reads(needs)
            kept = kept_input(x, rows) if read[0] else None
        ctx.save_for_backward(
            kept, weight if read[1] else None, u if read[2] else None,
            state.table, state.scaling, order, starts, dropout_p, seed,
            *[w if r else None for w, r in zip(weights, read[9:], strict=True)],
        )  # fmt: skip
        # Held, so that the memory of a bank's removed adapters is not used again before backward.
        ctx.state, ctx.dtype = state, dtype
        ctx.x_shape, ctx.x_dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype
        return _as_shape(y, x)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("multi_lora_linear has no second derivative: call backward without create_graph=True")
        saved, needs = read_saved(ctx, "multi_lora_linear", _SAVED, _reads)
        x, weight, u, table, scaling, order, starts, dropout_p, seed, *weights = saved
        need_x, _, need_bias = needs[:3]
        need = list(needs[9:])
        dy = _rows(dy, dy.dtype)
        if u is None:
            u = dy.new_empty((dy.shape[0], ctx.state.max_rank), dtype=accumulate_dtype(ctx.dtype))
        # Of a matrix that no gradient reads an op uses the shape alone.
        weights = [known if w is None else w for w, known in zip(weights, ctx.state.weights, strict=True)]
        du, dbias, grads = _bwd_adapter(
            dy, None if x is None else _rows(x, ctx.dtype), u, weights, table, scaling, order, starts, dropout_p, seed,
            need, need_bias,
        )  # fmt: skip
        dx = None
        if need_x:
            dx = _bwd_input(
                dy, du, None if weight is None else _cast(weight, ctx.dtype), ctx.state.in_features, weights, table,
                order, starts, dropout_p, seed,
            )  # fmt: skip
            dx = _cast(dx.view(ctx.x_shape), ctx.x_dtype)
        grads = [g if n else None for g, n in zip(grads, need, strict=True)]
        return dx, None, _cast(dbias, ctx.bias_dtype) if need_bias else None, *[None] * 6, *grads


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


def _call(x, weight, bias, state: AdapterTable, adapter_ids, dropout_p, seed, dtype) -> Tensor:
    order, starts = route(adapter_ids, x, state)
    seed = seed_tensor(seed, x.device) if dropout_p is not None else None
    inputs = (x, bias, *state.weights)
    # A trace records the op itself, which has no gradient.
    grad = torch.is_grad_enabled() and torch._C._get_tracing_state() is None
    if grad and any(t is not None and t.requires_grad for t in inputs):
        return MultiLoRALinearFunction.apply(
            x, weight, bias, state, order, starts, dropout_p, seed, dtype, *state.weights
        )  # fmt: skip
    y, _ = _fwd(
        _rows(x, dtype), None if weight is None else _cast(weight, dtype), state.out_features, bias,
        _weights(state), state.table, state.scaling, state.max_rank, order, starts, dropout_p, seed,
    )  # fmt: skip
    return _as_shape(y, x)


def _weights(state: AdapterTable) -> list[Tensor]:
    # A compiler takes no other list than a plain one.
    return list(state.weights) if torch.compiler.is_compiling() else state.weights


def _no_transforms(name: str) -> None:
    if torch._C._functorch.maybe_current_level() is not None and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name} does not support torch.func transforms (grad, vmap, jvp); call it outside of them")


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
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
    _no_transforms("multi_lora_linear")
    check_base(x, weight)
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError("weight requires grad, but gets no gradient here: freeze it with requires_grad_(False)")
    if bias is not None:
        check_tensor("bias", bias)
    autocast = _autocast_dtype(x)
    dtype = autocast or x.dtype
    if autocast is None and weight.dtype != dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {dtype} like x")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected (N,) with N = {weight.shape[0]}")
    if bias is not None and bias.dtype not in (dtype, torch.float32):
        bias = bias.to(dtype)
    state = _state(adapters, x, dtype)
    if weight.shape[0] != state.out_features:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K) with N = {state.out_features}")
    p = _probabilities(dropout_p, training, state.table.shape[0], x.device)
    return _call(x, weight, bias, state, adapter_ids, p, seed, dtype)


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
    _no_transforms("sgmv")
    check_tensor("x", x)
    if x.dim() < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., K)")
    dtype = x.dtype if out is not None else _autocast_dtype(x) or x.dtype
    state = _state(adapters, x, dtype)
    if out is None:
        return _call(x, None, None, state, adapter_ids, None, None, dtype)
    check_tensor("out", out)
    shape = (*x.shape[:-1], state.out_features)
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != x.device:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, expected {dtype} {shape} on {x.device}"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, out, *state.weights)):
        raise RuntimeError("sgmv(out=...) works in place and has no gradient: use multi_lora_linear, or no_grad")
    order, starts = route(adapter_ids, x, state)
    rows = out.view(-1, state.out_features) if out.dim() != 2 else out
    _add(rows, _rows(x, dtype), _weights(state), state.table, state.scaling, state.max_rank, order, starts)
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # so that whoever saved it for a gradient notices
    return out

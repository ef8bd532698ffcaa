"""multi_lora_linear and sgmv as differentiable functions.

Saved for backward, each only if a gradient that is needed reads it (``_reads``): x, or a copy of it where that costs less
(``saved.py``); u (M, max_rank) in fp32; the base product (M, N) only if a base_out_scale trains; parameters, the route and
a seed. A bank's weights get no gradient; what they were in forward stays readable until backward is done.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.cpu import multi_call as native
from ..backends.cpu.call import weight_of
from ..bases.base import Base, base_of, check_shape
from ..checks import accumulate_dtype, check_tensor
from ..dispatch.registry import caller
from ..dispatch.watch import nobody_watches
from ..many.adapter import Adapter
from ..many.bank import AdapterBank
from ..many.route import route
from ..many.table import AdapterTable, probabilities, table_of
from ..ops.adapter_table import BETA, PHI, RANK_BIAS
from ..ops.dropout_mask import check_p, seed_tensor
from ..ops.multi_lora_linear import NO_BASE
from ..settings import Settings, current
from .saved import kept_input, read_saved
from .shapes import as_shape, autocast_dtype, cast, cast_base, escaped, no_transforms, rows_of, unlooked

_fwd, _bwd = caller("multi_lora_linear_fwd"), caller("multi_lora_linear_bwd")
_add = caller("sgmv_add")
# No base: the branch is all there is.
BRANCH = Base(NO_BASE, ())
_SAVED = ("x", "u", "h", "table", "scaling", "order", "starts", "dropout_p", "seed", "weight or an adapter's part")


class Parts(NamedTuple):
    """How the tensors of a node follow each other: the base's, the weights, the vectors, whose ``owners`` the table names.

    ``curved``: whether an adapter has an activation."""

    base: int
    weights: int
    owners: tuple[tuple[int, str], ...]
    curved: bool

    def split(self, tensors: Sequence) -> tuple[Sequence, Sequence, Sequence]:
        """(the base's, weights, vectors)."""
        end = self.base + self.weights
        return tensors[: self.base], tensors[self.base : end], tensors[end:]


def _trained(needs: tuple[bool, ...], parts: Parts) -> list[tuple[int, str]]:
    """(slot, symbol) of the vectors that need a gradient. A bank's need none, as its other tensors."""
    return [owner for owner, need in zip(parts.owners, parts.split(needs[4:])[2]) if need]


def _trains(symbol: str, needs: tuple[bool, ...], parts: Parts) -> bool:
    return any(trained == symbol for _, trained in _trained(needs, parts))


def _needs_product(needs: tuple[bool, ...], parts: Parts) -> bool:
    """Whether a gradient is needed that reads the base."""
    return needs[0] or _trains("p_b", needs, parts)


@functools.cache
def _reads(needs: tuple[bool, ...], parts: Parts) -> tuple[bool, ...]:
    """Which of ``_SAVED`` the needed gradients read; last the base's tensors, lora_A and lora_B of each adapter, vectors."""
    dx, (_, matrices, vectors), trained = needs[0], parts.split(needs[4:]), _trained(needs, parts)
    symbols = {symbol for _, symbol in trained}
    through_B = {slot for slot, symbol in trained if symbol in ("d", "p_d", "g_d", RANK_BIAS)}
    x = any(matrices[::2]) or bool(symbols & {"p_b", "p_d"})
    u = any(matrices[1::2]) or bool(symbols & {"d", "g_d"})
    u = u or (parts.curved and (dx or x or RANK_BIAS in symbols))
    read: list[bool] = []
    for i in range(len(matrices)):
        if i % 2 == 0:
            read.append(dx or (i // 2, "p_d") in trained)
        else:
            read.append(dx or matrices[i - 1] or i // 2 in through_B)
    # Vectors are small; a bias is never read again.
    kept = [symbol != BETA for _, symbol in parts.owners] or [True] * len(vectors)
    return x, u, "g_b" in symbols, *[True] * 6, *[_needs_product(needs, parts)] * parts.base, *read, *kept


class Batch(NamedTuple):
    """What a pass takes besides x, dy and weights: which row takes which adapter, and how.

    ``now``: the settings, None if somebody watches which ops are called. ``kind``: of the base. ``autocast``: what x and the
    base are cast to, None if they are not.
    """

    now: Settings | None
    kind: str
    state: AdapterTable
    order: Tensor
    starts: Tensor
    dropout_p: Tensor | None
    seed: Tensor | None
    autocast: torch.dtype | None

    def forward(self, x: Tensor, bias: Tensor | None, tensors: Sequence[Sequence[Tensor]], want_u: bool, want_h: bool):
        """(y, u, h) of an x (..., K) that was cast; y alone unless u is wanted. ``tensors``: base, weights, vectors."""
        now, kind, state, order, starts, dropout_p, seed, autocast = self
        base, weights, vectors = tensors
        if now is not None:
            done = native.forward(
                now, torch.get_num_threads(), x, kind, weight_of(base), bias, state.native(), order, starts,
                dropout_p, seed, want_u, want_h,
            )  # fmt: skip
            if done is not None:
                return done
        y, u, h = _fwd(
            rows_of(x, x.dtype), cast_base(kind, base, autocast), kind, state.out_features, bias, _contiguous(weights),
            state.table, state.scaling, state.max_rank, order, starts, dropout_p, seed, _contiguous(vectors), state.acting,
            want_h,
        )  # fmt: skip
        y = as_shape(y, x)
        return (y, u, h) if want_u else y


def _contiguous(weights: Sequence[Tensor]) -> list[Tensor]:
    # As a table of whole matrices counts on: the data of a parameter may have been exchanged since it was made.
    return [w.contiguous() for w in weights]


class MultiLoRALinearFunction(torch.autograd.Function):
    """The op with its gradients. The base's and the state's tensors come last, flat: autograd sees no lists."""

    @staticmethod
    def forward(ctx, x, bias, batch, parts, *tensors):
        state, needs = batch.state, ctx.needs_input_grad
        given = x if batch.autocast is None else cast(x, batch.autocast)
        y, u, h = batch.forward(given, bias, parts.split(tensors), True, _trains("g_b", needs, parts))
        saved = (x, u, h, state.table, state.scaling, batch.order, batch.starts, batch.dropout_p, batch.seed, *tensors)
        if not torch.compiler.is_compiling():  # a compiler drops what it does not need by itself
            read = _reads(needs, parts)
            kept = kept_input(x, given, batch.now) if read[0] else None
            saved = (kept, *[t if r else None for t, r in zip(saved[1:], read[1:], strict=True)])
        ctx.save_for_backward(*saved)
        # Held, so that the memory of a bank's removed adapters is not used again before backward.
        ctx.state, ctx.kind, ctx.autocast, ctx.now = state, batch.kind, batch.autocast, batch.now
        ctx.parts, ctx.dtype = parts, given.dtype
        ctx.x_shape, ctx.x_dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("multi_lora_linear has no second derivative: call backward without create_graph=True")
        parts, state, kind, grads = ctx.parts, ctx.state, ctx.kind, None
        saved, needs = read_saved(ctx, "multi_lora_linear", lambda: _SAVED, lambda needs: _reads(needs, parts))
        x, u, h, table, scaling, order, starts, dropout_p, seed, *tensors = saved
        need_x, need_bias, (_, need, need_vectors) = needs[0], needs[1], parts.split(needs[4:])
        base, weights, vectors = parts.split(tensors)
        # Of a matrix that no gradient reads an op uses the shape alone.
        weights = [known if w is None else w for w, known in zip(weights, state.weights, strict=True)]
        vectors = [known if v is None else v for v, known in zip(vectors, state.vectors, strict=True)]
        if ctx.now is not None and nobody_watches():
            grads = native.backward(
                current(), torch.get_num_threads(), dy, x, u, kind, weight_of(base),
                state.native() if state.fixed else state.given(weights, vectors), order, starts, dropout_p, seed, need_x,
                need_bias, need, h, need_vectors,
            )  # fmt: skip
        if grads is None:
            dy = rows_of(dy, dy.dtype)
            x = None if x is None else rows_of(x, ctx.dtype)
            if u is None:
                u = dy.new_empty((dy.shape[0], state.max_rank), dtype=accumulate_dtype(ctx.dtype))
            base = cast_base(kind, base, ctx.autocast) if _needs_product(needs, parts) else []
            h = h if _trains("g_b", needs, parts) else None
            dx, dbias, grads, sums = _bwd(
                dy, x, u, base, kind, state.in_features, _contiguous(weights), table, scaling, order, starts, dropout_p, seed,
                need_x, need_bias, list(need), _contiguous(vectors), state.acting, h, list(need_vectors),
            )  # fmt: skip
            dx = dx.view(ctx.x_shape) if need_x else None
            grads = (
                dx,
                dbias,
                *([g if n else None for g, n in zip(*pair)] for pair in ((grads, need), (sums, need_vectors))),
            )
        dx, dbias, grads, sums = grads
        dx = cast(dx, ctx.x_dtype) if need_x else None
        return dx, cast(dbias, ctx.bias_dtype) if need_bias else None, None, None, *[None] * parts.base, *grads, *sums


_apply = unlooked(MultiLoRALinearFunction)


def _state(adapters, x: Tensor, dtype: torch.dtype, base: Base | None = None) -> AdapterTable:
    if type(adapters) is AdapterTable:
        return adapters  # of a list that the caller has checked against x
    if not isinstance(adapters, AdapterBank):
        return table_of(adapters, x, dtype, base)
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
    weights, vectors = batch.state.weights, batch.state.vectors
    # A trace records the op itself, which has no gradient.
    if torch.is_grad_enabled() and (batch.now is not None or torch._C._get_tracing_state() is None):
        for t in (x, bias, *weights, *vectors):
            if t is not None and t.requires_grad:
                parts = Parts(len(base.tensors), len(weights), batch.state.owners, PHI in batch.state.acting.split())
                apply = MultiLoRALinearFunction.apply if batch.now is None or escaped(x) else _apply
                return apply(x, bias, batch, parts, *base.tensors, *weights, *vectors)
    given = x if batch.autocast is None else cast(x, batch.autocast)
    return batch.forward(given, bias, (base.tensors, weights, vectors), False, False)


def _check_x(x) -> None:
    check_tensor("x", x)
    if x.dim() < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., K)")


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | Base,
    adapters: Sequence[tuple[Tensor, Tensor, float] | Adapter] | AdapterBank,
    adapter_ids: Tensor,
    *,
    bias: Tensor | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A frozen linear layer in which every row has an adapter of its own, of whatever method.

        y_t = g_b[a] * ((x_t * p_b[a]) W^T) + s[a] g_d[a] * ((d[a] * ((drop(x_t) * p_d[a]) A[a]^T)) B[a]^T) + beta[a]

    with a the adapter of row t; vectors that it does not have are 1, and without a bias of its own the layer's is added.
    Serves what punica's SGMV and HF PEFT's ``adapter_names`` serve, for any mix of methods and ranks, and trains.

    Args:
        x: (..., K) in fp32, bf16 or fp16 (fp64 through the reference).
        weight: (N, K) in x's dtype. Frozen: it gets no gradient.
        adapters: ``(lora_A (R, K), lora_B (N, R), scaling)`` or an Adapter each, ranks of any mix, matrices in fp32 or x's
            dtype (all alike, or they are taken in fp32); or an AdapterBank, whose weights get no gradient.
        adapter_ids: int32 or int64 on x's device: one per row of the flattened x, or one per leading index. -1 takes the
            base and ``bias`` alone. A list's ids are its positions, a bank's come from ``bank.ids``. On a GPU what writes
            them past torch (another library, ``.data``) is not seen: give it another tensor.
        bias: (N), of the layer, in fp32 or x's dtype (any under autocast).
        dropout_p: drop probability of the branch's input, one for all adapters or one each; acts if ``training``.
        seed: as in ``lora_linear``: bits depend on (seed, flattened row, column) alone.

    Returns:
        (..., N) in x's dtype, or the autocast dtype. A row's branch has the same bits whatever else is in the batch.

    Raises:
        ValueError, TypeError: an argument that does not fit, named in the message; on CPU an id that no adapter has.
            On a GPU the row of such an id is NaN.
        RuntimeError: a second derivative, or use under a torch.func transform; in backward as in ``lora_linear``.
        NotImplementedError: an argument with a tangent of forward-mode AD.

    ``torch.jit.trace`` records the ops themselves: the trace takes any ids, needs this package and has no gradient.
    """
    no_transforms("multi_lora_linear")
    base, now = base_of(weight), current() if nobody_watches() else None
    _check_x(x)
    if torch.is_grad_enabled():
        for t in base.tensors:
            if t.requires_grad:
                raise ValueError(
                    "weight requires grad, but gets no gradient here: freeze it with requires_grad_(False)"
                )
    autocast = autocast_dtype(x)
    dtype = autocast or x.dtype
    if bias is not None:
        check_tensor("bias", bias)
        if autocast is not None and bias.dtype not in (dtype, torch.float32):
            bias = bias.to(dtype)
    state = _state(adapters, x, dtype, base)
    if base.shape is not None:
        check_shape(base, state.out_features, x.shape[-1], "adapters and x")
    p = None if dropout_p == 0.0 else _probabilities(dropout_p, training, state.table.shape[0], x.device)
    seed = seed_tensor(seed, x.device) if p is not None else None
    # Whether base and bias fit the rest is checked by the op.
    return _call(x, base, bias, Batch(now, base.kind, state, *route(adapter_ids, x, state), p, seed, autocast))


def known_multi_lora_linear(
    x: Tensor, weight: Tensor | Base, table: AdapterTable, order: Tensor, starts: Tensor, bias: Tensor | None
) -> Tensor:
    """``multi_lora_linear`` without dropout and outside of autocast, of a table and a route that were made for arguments like
    these, by a caller that knows them to be what it takes."""
    base, now = base_of(weight), current() if nobody_watches() else None
    return _call(x, base, bias, Batch(now, base.kind, table, order, starts, None, None, None))


def sgmv(
    x: Tensor,
    adapters: Sequence[tuple[Tensor, Tensor, float] | Adapter] | AdapterBank,
    adapter_ids: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The branch alone, scaling included; rows with id -1 are zero.

        y_t = s[a] g_d[a] * ((d[a] * ((x_t * p_d[a]) A[a]^T)) B[a]^T)

    Arguments as in ``multi_lora_linear``, without adapters that act on a base. With ``out`` (..., N), in x's dtype, the
    branch is added to it in place (one rounding) and it is returned; base-only rows keep their bits.

    Raises:
        ValueError, TypeError: as in ``multi_lora_linear``, and an ``out`` of another shape, dtype or device; an adapter,
            in a bank any, that has a base scale or a bias.
        RuntimeError: ``out`` where a gradient is required.
    """
    no_transforms("sgmv")
    _check_x(x)
    now = current() if nobody_watches() else None
    autocast = None if out is not None else autocast_dtype(x)
    dtype = autocast or x.dtype
    state = _state(adapters, x, dtype)
    if state.beside is not None:
        raise ValueError(f"{state.beside} acts on the base, which sgmv does without: use multi_lora_linear")
    order, starts = route(adapter_ids, x, state)
    if out is None:
        return _call(x, BRANCH, None, Batch(now, NO_BASE, state, order, starts, None, None, autocast))
    check_tensor("out", out)
    shape = (*x.shape[:-1], state.out_features)
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != x.device:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, expected {dtype} {shape} on {x.device}"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, out, *state.weights, *state.vectors)):
        raise RuntimeError("sgmv(out=...) works in place and has no gradient: use multi_lora_linear, or no_grad")
    if now is None or native.add(now, torch.get_num_threads(), out, x, state.native(), order, starts) is None:
        rows, weights = out.view(-1, state.out_features) if out.dim() != 2 else out, _contiguous(state.weights)
        args = state.table, state.scaling, state.max_rank, order, starts, _contiguous(state.vectors), state.acting
        _add(rows, rows_of(x, dtype), weights, *args)
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # so that whoever saved it for a gradient notices
    return out

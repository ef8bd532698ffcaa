"""lora_linear as a differentiable function.

Saved for backward, each only if a gradient that is needed reads it (``_reads``): x, or a copy of it where that costs less
(``saved.py``); u, which is (M, R) in fp32; the base product, (M, N), only if base_out_scale trains; parameters and a
seed. Dropout bits are drawn again from the seed in backward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.cpu import call as native
from ..backends.cpu.call import weight_of
from ..bases.base import QUANTISED, Base, base_of, check_shape, kind_of
from ..checks import accumulate_dtype, check_beside, check_factor, check_number, check_tensor
from ..dispatch.registry import caller
from ..dispatch.watch import nobody_watches
from ..equation import NO_SCALES, PLACES, Needs, Scales, fold, names
from ..ops.dropout_mask import acting, seed_tensor
from ..settings import Settings, current
from .saved import kept_input, read_saved
from .shapes import as_shape, autocast_dtype, cast, cast_base, escaped, no_transforms, rows_of, unlooked

_fwd, _bwd = caller("lora_linear_fwd"), caller("lora_linear_bwd")
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


class Call(NamedTuple):
    """What a pass takes besides tensors. ``now``: the settings, None if somebody watches which ops are called.

    ``dtype``: what autocast casts x and the base to, inside, so that backward saves the base as it is; None without it.
    ``scaled``: whether there are vectors.
    """

    now: Settings | None
    kind: str
    scaling: float
    dropout_p: float
    dtype: torch.dtype | None
    scaled: bool

    def split(self, rest: tuple) -> tuple[tuple[Tensor | None, ...] | None, Tensor | None, tuple[Tensor, ...]]:
        """(vectors by place or None, seed or None, the base's tensors) of the arguments that not every call has."""
        at = 5 if self.scaled else 0
        scales = rest[:at] if at else None
        return (scales, rest[at], rest[at + 1 :]) if self.dropout_p > 0.0 else (scales, None, rest[at:])

    def forward(self, x, lora_A, lora_B, bias, rest: tuple, want_u: bool, want_h: bool):
        """(y, u, h) of x (..., K), cast already, or y alone if neither of u and h is wanted."""
        now, kind, scaling, dropout_p, dtype, _ = self
        scales, seed, base = self.split(rest)
        if now is not None:
            done = native.forward(
                now, torch.get_num_threads(), x, kind, weight_of(base), lora_A, lora_B, bias, scaling, dropout_p, seed,
                scales, want_u, want_h,
            )  # fmt: skip
            if done is not None:
                return done
        y, u, h = _fwd(
            rows_of(x, x.dtype), cast_base(kind, base, dtype), kind, lora_A, lora_B, bias, scaling, dropout_p, seed,
            list(scales or NO_SCALES), want_h,
        )  # fmt: skip
        y = as_shape(y, x)
        return (y, u, h) if want_u or want_h else y


@functools.cache
def _reads(needs: tuple[bool, ...], scaled: bool, drops: bool) -> tuple[bool, ...]:
    """Which of x, lora_A, lora_B, u, h and the rest the needed gradients read. Of a vector that needs one, its dtype."""
    scales = needs[5:10] if scaled else (False,) * 5
    need, base = Needs(*needs[:4], *scales), len(needs) - 5 - 5 * scaled - drops
    dx = need.x or need.p_b
    du, H = dx or need.A or need.p_d, need.B or need.g_d
    read = (need.A or need.p_d or need.p_b, dx or need.p_d, du or need.d or need.g_d, H or need.d, need.g_b)
    vectors = (du or H or need.d, dx, dx or need.A or need.p_d, dx or need.g_b, du or need.d or H) if scaled else ()
    return (*read, *vectors, *[True] * drops, *[dx] * base)


@functools.cache
def _unread(needs: tuple[bool, ...], scaled: bool, drops: bool) -> tuple[int, ...]:
    return tuple(i for i, read in enumerate(_reads(needs, scaled, drops)) if not read)


def _names(scaled: bool, drops: bool) -> tuple[str, ...]:
    """The same as arguments, for messages."""
    vectors = map(names, Scales._fields) if scaled else ()
    return ("x", "lora_A", "lora_B", "u", "h", *vectors, *["seed"] * drops, "weight")


@functools.cache
def _bits(needs: tuple[bool, ...], scaled: bool) -> int:
    """``needs`` as the native entry takes them: a bit each, in the order of equation.Needs."""
    return sum(1 << i for i, need in enumerate(needs[:4] + (needs[5:10] if scaled else ())) if need)


class LoRALinearFunction(torch.autograd.Function):
    """The op with its gradients. ``rest``: vectors by place if there are any, a seed if dropout acts, the base's tensors."""

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, bias, call, *rest):
        needs, scaled = ctx.needs_input_grad, call.scaled
        given, need_h = x if call.dtype is None else cast(x, call.dtype), scaled and needs[8]
        y, u, h = call.forward(given, lora_A, lora_B, bias, rest, True, need_h)
        saved = [x, lora_A, lora_B, u, h if need_h else None, *rest]
        if not torch.compiler.is_compiling():  # a compiler drops what it does not need by itself
            for i in _unread(needs, scaled, call.dropout_p > 0.0):
                saved[i] = None
            if saved[0] is not None:
                saved[0] = kept_input(x, given, call.now)
        ctx.save_for_backward(*saved)
        ctx.call = call
        ctx.x = x.shape, x.dtype
        ctx.adapter = lora_A.shape[0], lora_A.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("lora_linear has no second derivative: call backward without create_graph=True")
        call, (shape, x_dtype), (rank, adapter_dtype) = ctx.call, ctx.x, ctx.adapter
        now, kind, scaling, dropout_p, dtype, scaled = call
        drops = dropout_p > 0.0
        saved, needs = read_saved(
            ctx, "lora_linear", lambda: _names(scaled, drops), lambda needs: _reads(needs, scaled, drops)
        )
        x, lora_A, lora_B, u, h, *rest = saved
        scales, seed, base = call.split(tuple(rest))
        grads = None
        if now is not None and nobody_watches():
            grads = native.backward(
                current(), torch.get_num_threads(), dy, x, u, h, kind, weight_of(base), lora_A, lora_B, scaling,
                dropout_p, seed, scales, _bits(needs, scaled), shape[-1], rank, adapter_dtype,
            )  # fmt: skip
        if grads is None:
            need = [*needs[:4], *(needs[5:10] if scaled else (False,) * 5)]
            grads = _careful_backward(ctx, dy, saved, need)
        dx, dA, dB, dbias, *vectors = grads
        if dx is not None and dx.dtype is not x_dtype:
            dx = dx.to(x_dtype)
        if dbias is not None and dbias.dtype is not ctx.bias_dtype:
            dbias = dbias.to(ctx.bias_dtype)
        if not scaled:
            return (dx, dA, dB, dbias, None, *[None] * len(rest))
        vectors = [None if g is None else cast(g, t.dtype) for g, t in zip(vectors, scales)]
        return (dx, dA, dB, dbias, None, *vectors, *[None] * (len(rest) - 5))


_apply = unlooked(LoRALinearFunction)


def _careful_backward(ctx, dy: Tensor, saved: tuple, need: list[bool]) -> list[Tensor | None]:
    """By the op: gradients in the order of equation.Needs, None where not needed."""
    (shape, _), (rank, adapter_dtype), dtype = ctx.x, ctx.adapter, ctx.call.dtype
    x, lora_A, lora_B, u, h, *rest = saved
    scales, seed, base = ctx.call.split(tuple(rest))
    dy = rows_of(dy, dy.dtype)
    M, N = dy.shape
    # What no gradient reads was not saved. An op then uses its shape alone; uninitialised memory costs nothing.
    lora_A = dy.new_empty((rank, shape[-1]), dtype=adapter_dtype) if lora_A is None else lora_A
    lora_B = dy.new_empty((N, rank), dtype=adapter_dtype) if lora_B is None else lora_B
    u = dy.new_empty((M, rank), dtype=accumulate_dtype(dy.dtype)) if u is None else u
    base = cast_base(ctx.call.kind, (t for t in base if t is not None), dtype)
    dx, dA, dB, dbias, vectors = _bwd(
        dy, None if x is None else rows_of(x, dy.dtype), u, h, base, ctx.call.kind, lora_A, lora_B, ctx.call.scaling,
        ctx.call.dropout_p, seed, list(scales or NO_SCALES), need,
    )  # fmt: skip
    grads = [g if n else None for g, n in zip((dx, dA, dB, dbias, *vectors), need)]
    if need[0]:
        grads[0] = dx.view(shape)
    return grads


def _scaled(d: Tensor | None, scaling: Tensor, R: int, x: Tensor) -> Tensor:
    # A tensor of one element becomes part of d: O(R), differentiable, never read by the host.
    check_factor("scaling", scaling, x.device, "x")
    dtype = accumulate_dtype(x.dtype)
    folded = scaling.to(dtype).reshape(1)
    return folded.expand(R) if d is None else folded * d.to(dtype)


# Codes that are read in another dtype: TorchScript has no such op, so a trace gets W itself.
_WHOLE_IN_TRACES = frozenset(("int4", "mxfp4", "q4_0", "q8_0"))


@contextlib.contextmanager
def _untraced():
    # While a trace is recorded sizes are tensors, which cannot be checked.
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def _traced_weight(x: Tensor, base: Base, lora_A: Tensor, lora_B: Tensor, **vectors: tuple) -> Tensor | None:
    # W, once all fits: torch's own ops would broadcast.
    kind = kind_of(base.kind)
    with _untraced():
        shape = N, K = lora_B.shape[0], lora_A.shape[-1]
        if base.shape is not None:
            check_shape(base, N, K, "lora_B and lora_A")
        if base.kind in QUANTISED:
            kind.check(base.tensors, x, K, N)
        if base.tensors:
            like = base.tensors[0] if base.kind == "dense" else base._replace(shape=shape)
            check_beside(like, None, {"lora_A": (lora_A, "R K"), "lora_B": (lora_B, "N R"), **vectors})
        if base.kind in _WHOLE_IN_TRACES:
            return kind.dequantise(base.tensors, x.dtype, shape)
    return kind.dequantise(base.tensors, x.dtype, shape)


def _traced(x: Tensor, base: Base, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, options: Options, s: Scales):
    # In torch's own ops: what torch.jit.trace records runs, and trains, where this package is not installed.
    def times(t, scale):
        return t if scale is None else t * scale.to(t.dtype)

    if base.kind == "w8a8":
        raise ValueError("a base of kind w8a8 cannot be traced: the gradient of rounding is not that of torch's ops")
    linear = torch.nn.functional.linear
    vectors = {names(at.symbol): (v, at.axis) for at, v in zip(PLACES, s) if v is not None}
    W = _traced_weight(x, base, lora_A, lora_B, **vectors, **({} if bias is None else {"bias": (bias, "N")}))
    into = times(x, s.p_b)
    h = times(into if W is None else linear(into, W), s.g_b)
    p = options.dropout_p
    dropped = times(torch.nn.functional.dropout(x, p, p > 0.0).to(lora_A.dtype), s.p_d)
    delta = times(linear(times(linear(dropped, lora_A), s.d), lora_B), s.g_d)
    y = h + options.scaling * delta
    return (y if bias is None else y + bias).to(h.dtype)


class Options(NamedTuple):
    """Numbers of a call: ``dropout_p`` is 0 outside of training; ``seed`` as the public function takes it."""

    scaling: float | Tensor = 1.0
    dropout_p: float = 0.0
    seed: int | Tensor | None = None


_PLAIN_OPTIONS = Options()


def _check(x: Tensor, base: Base, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise TypeError for what is no plain tensor; shapes, dtypes and devices are checked by the op."""
    check_tensor("x", x)
    for i, t in enumerate(base.tensors):
        check_tensor("weight" if base.kind == "dense" else f"{base.kind}[{i}]", t, dtypes=None)
    for name, value in tensors.items():
        if value is not None or name in ("lora_A", "lora_B"):
            check_tensor(name, value)


def _cast_all(tensors: tuple[Tensor | None, ...], dtype: torch.dtype, other: torch.dtype) -> tuple[Tensor | None, ...]:
    # What is neither in fp32 nor in autocast's dtype becomes ``other``.
    return tuple(t if t is None or t.dtype in (torch.float32, dtype) else t.to(other) for t in tensors)


def lora_linear_with(
    x: Tensor, weight: Tensor | Base, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None = None,
    options: Options = _PLAIN_OPTIONS, coefficients: Mapping[str, Tensor | None] | Scales | None = None,
) -> Tensor:  # fmt: skip
    """``lora_linear`` on any base, with coefficients by name, rows of peftkern/equation.py, or a vector at each place.

    Raises as ``lora_linear``.
    """
    base, now = base_of(weight), current() if nobody_watches() else None
    if now is None:
        no_transforms("lora_linear")
    plain = (
        type(x) in _PLAIN
        and type(lora_A) in _PLAIN
        and type(lora_B) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
    )
    by_place = type(coefficients) is Scales
    if now is None or not plain or coefficients:
        named = {names(at.symbol): v for at, v in zip(PLACES, coefficients)} if by_place else coefficients or {}
        _check(x, base, {"lora_A": lora_A, "lora_B": lora_B, "bias": bias, **named})
    scaling, dropout_p, seed = options
    scales = None if coefficients is None else tuple(coefficients if by_place else fold(coefficients, x))
    if now is None and torch._C._get_tracing_state() is not None:
        return _traced(x, base, lora_A, lora_B, bias, options, Scales(*(scales or NO_SCALES)))
    if base.shape is not None and x.dim() and lora_B.dim():
        check_shape(base, lora_B.shape[0], x.shape[-1], "lora_B and x")
    if type(scaling) is not float:
        if isinstance(scaling, Tensor):
            d, *others = scales or NO_SCALES
            scales, scaling = (_scaled(d, scaling, lora_A.shape[0], x), *others), 1.0
        else:
            check_number("scaling", scaling)
            scaling = float(scaling)
    dtype = autocast_dtype(x)
    if dtype is not None:
        lora_A, lora_B, bias = _cast_all((lora_A, lora_B, bias), dtype, dtype)
        scales = None if scales is None else _cast_all(scales, dtype, torch.float32)
    call, rest = Call(now, base.kind, scaling, dropout_p, dtype, scales is not None), base.tensors
    if dropout_p > 0.0:
        rest = (seed_tensor(seed, x.device), *rest)
    if scales is not None:
        if now is None and scales[4] is not None:  # may be g_b itself (DoRA), and dynamo takes no tensor twice
            scales = (*scales[:4], scales[4].view_as(scales[4]))
        rest = (*scales, *rest)
    if torch.is_grad_enabled():
        for t in base.tensors:
            if t.requires_grad:
                raise ValueError(
                    "weight requires grad, but gets no gradient here: freeze it with requires_grad_(False)"
                )
        for t in (x, lora_A, lora_B, bias, *(scales or ())):
            if t is not None and t.requires_grad:
                apply = LoRALinearFunction.apply if now is None or escaped(x) else _apply
                return apply(x, lora_A, lora_B, bias, call, *rest)
    return call.forward(x if dtype is None else cast(x, dtype), lora_A, lora_B, bias, rest, False, False)


def lora_linear(
    x: Tensor,
    weight: Tensor | Base,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    rank_scale: Tensor | None = None,
    base_in_scale: Tensor | None = None,
    delta_in_scale: Tensor | None = None,
    base_out_scale: Tensor | None = None,
    delta_out_scale: Tensor | None = None,
) -> Tensor:
    """A frozen linear layer plus a low-rank branch.

        y = g_b * ((x * p_b) W^T) + s * g_d * ((d * ((drop(x) * p_d) A^T)) B^T) + bias

    Matches LoRA (Hu et al. 2021) as HF PEFT computes it, and with the scale vectors AdaLoRA, VeRA, (IA)^3, SSF and
    DoRA's scaled form.

    Args:
        x: (..., K) in fp32, bf16 or fp16 (fp64 through the reference).
        weight: (N, K) in x's dtype, or a base (peftkern/bases). Frozen: it gets no gradient.
        lora_A: (R, K). lora_B: (N, R). Both in fp32 or both in x's dtype.
        bias: (N), added after all scales, never scaled.
        scaling: s, a float or a one-element tensor on x's device (differentiable, not synchronised to the host).
        dropout_p: drop probability of the branch's input, acts if ``training`` and > 0.
        seed: int or one-element int64 tensor on x's device; the bits depend on (seed, flattened row, column) only and
            are those of ``dropout_mask``. None draws one from torch's default generator, only if dropout acts.
        rank_scale (R), base_in_scale (K), delta_in_scale (K), base_out_scale (N), delta_out_scale (N): d, p_b, p_d,
            g_b, g_d, in fp32 or x's dtype.

    Returns:
        (..., N) in x's dtype, or in the autocast dtype under autocast (x and weight are cast as ``F.linear`` casts
        them, fp32 adapters stay fp32). Each gradient has its input's dtype.

    Raises:
        ValueError, TypeError: an argument that does not fit, named in the message; a weight that requires grad while
            grad mode is on.
        RuntimeError: a second derivative, or use under a torch.func transform; in backward, an x that was changed in place
            since and is needed as it was. The message names the layer; ``PEFTKERN_SAVE_INPUT=copy`` allows it.
        NotImplementedError: an argument with a tangent of forward-mode AD.

    ``torch.jit.trace`` records torch's own ops, with torch's dropout.
    """
    if type(dropout_p) is not float or dropout_p != 0.0:
        dropout_p = acting(dropout_p, training)
    coefficients = None
    if not (
        rank_scale is None
        and base_in_scale is None
        and delta_in_scale is None
        and base_out_scale is None
        and delta_out_scale is None
    ):
        coefficients = {
            "rank_scale": rank_scale,
            "base_in_scale": base_in_scale,
            "delta_in_scale": delta_in_scale,
            "base_out_scale": base_out_scale,
            "delta_out_scale": delta_out_scale,
        }
    return lora_linear_with(x, weight, lora_A, lora_B, bias, Options(scaling, dropout_p, seed), coefficients)

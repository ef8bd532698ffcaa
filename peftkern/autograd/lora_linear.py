"""lora_linear as a differentiable function.

Saved for backward, each only if a gradient that is needed reads it (``_reads``): x, or a copy of it where that costs less
(``saved.py``); u, which is (M, R) in fp32; the base product, (M, N), only if base_out_scale trains; parameters and a
seed. Dropout bits are drawn again from the seed in backward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.cpu import call as native
from ..bases.base import Base, base_of, kind_of
from ..checks import accumulate_dtype, check_number, check_tensor
from ..dispatch.registry import caller
from ..dispatch.watch import nobody_watches
from ..equation import NO_SCALES, Needs, Scales, fold, names
from ..ops.dropout_mask import check_p, seed_tensor
from ..settings import Settings, current
from .saved import kept_input, read_saved
from .shapes import as_shape, autocast_dtype, cast, no_transforms, rows_of

_fwd, _bwd = caller("lora_linear_fwd"), caller("lora_linear_bwd")
# Of the arguments of the autograd function: those that may need a gradient, in the order of equation.Needs.
_TRAINABLE = slice(5, 5 + len(Needs._fields))
_BASE = _TRAINABLE.stop + 1
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_SAVED = ("x", "lora_A", "lora_B", "u", "h", "seed", *map(names, Scales._fields), "weight")


@functools.cache
def _reads(needs: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which of ``_SAVED`` the needed gradients read, the base's tensors last. Of a vector that needs one, its dtype."""
    need, base = Needs(*needs[_TRAINABLE]), needs[_BASE:]
    dx = need.x or need.p_b
    du, H = dx or need.A or need.p_d, need.B or need.g_d
    return (
        need.A or need.p_d or need.p_b, dx or need.p_d, du or need.d or need.g_d, H or need.d, need.g_b, True,
        du or H or need.d, dx, dx or need.A or need.p_d, dx or need.g_b, du or need.d or H, *[dx] * len(base),
    )  # fmt: skip


@functools.cache
def _bits(needs: tuple[bool, ...]) -> int:
    return sum(1 << i for i, need in enumerate(needs[_TRAINABLE]) if need)


def _some(scales: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    d, p_b, p_d, g_b, g_d = scales
    return None if d is None and p_b is None and p_d is None and g_b is None and g_d is None else scales


def _cast_base(kind: str, tensors: Iterable[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    return list(tensors) if dtype is None else kind_of(kind).cast(list(tensors), dtype)


class Call(NamedTuple):
    """What a pass takes besides x and dy. ``now``: the settings, None if somebody watches which ops are called.

    ``dtype``: what autocast casts x and the base to, inside, so that backward saves the base as it is; None without it.
    ``scales``: None if there is none.
    """

    now: Settings | None
    base: Base
    scaling: float
    dropout_p: float
    seed: Tensor | None
    dtype: torch.dtype | None
    scales: tuple[Tensor | None, ...] | None

    def forward(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, want_u: bool, want_h: bool):
        """(y, u, h) of x (..., K), cast already, or y alone if neither of u and h is wanted."""
        now, base, scaling, dropout_p, seed, dtype, scales = self
        if now is not None:
            weight = base.tensors[0] if base.tensors else None
            done = native.forward(
                now, torch.get_num_threads(), x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, scales, want_u, want_h
            )  # fmt: skip
            if done is not None:
                return done
        y, u, h = _fwd(
            rows_of(x, x.dtype), _cast_base(base.kind, base.tensors, dtype), base.kind, lora_A, lora_B, bias, scaling,
            dropout_p, seed, list(scales or NO_SCALES), want_h,
        )  # fmt: skip
        y = as_shape(y, x)
        return (y, u, h) if want_u or want_h else y


class LoRALinearFunction(torch.autograd.Function):
    """The op with its gradients."""

    @staticmethod
    def forward(
        ctx, now, kind, scaling, dropout_p, dtype, x, lora_A, lora_B, bias, d, p_b, p_d, g_b, g_d, seed, *base
    ):  # fmt: skip
        scales, needs = (d, p_b, p_d, g_b, g_d), ctx.needs_input_grad
        given = x if dtype is None else cast(x, dtype)
        call = Call(now, Base(kind, base), scaling, dropout_p, seed, dtype, _some(scales))
        need_h = needs[_BASE - 3]
        y, u, h = call.forward(given, lora_A, lora_B, bias, True, need_h)
        saved = (x, lora_A, lora_B, u, h if need_h else None, seed, *scales, *base)
        if not torch.compiler.is_compiling():  # a compiler drops what it does not need by itself
            read = _reads(needs)
            kept = kept_input(x, given) if read[0] else None
            saved = (kept, *[t if r else None for t, r in zip(saved[1:], read[1:])])
        ctx.save_for_backward(*saved)
        ctx.call = now, kind, scaling, dropout_p, dtype
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.rank, ctx.adapter_dtype = lora_A.shape[0], lora_A.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("lora_linear has no second derivative: call backward without create_graph=True")
        saved, needs = read_saved(ctx, "lora_linear", _SAVED, _reads)
        x, lora_A, lora_B, u, h, seed, d, p_b, p_d, g_b, g_d, *base = saved
        now, kind, scaling, dropout_p, dtype = ctx.call
        scales, rank, K, grads = (d, p_b, p_d, g_b, g_d), ctx.rank, ctx.x_shape[-1], None
        if now is not None and nobody_watches():
            grads = native.backward(
                current(), torch.get_num_threads(), dy, x, u, h, base[0] if base else None, lora_A, lora_B, scaling, dropout_p,
                seed, _some(scales), _bits(needs), K, rank, ctx.adapter_dtype,
            )  # fmt: skip
        if grads is None:
            need, dy = needs[_TRAINABLE], rows_of(dy, dy.dtype)
            M, N = dy.shape
            # What no gradient reads was not saved. An op then uses its shape alone; uninitialised memory costs nothing.
            lora_A = dy.new_empty((rank, K), dtype=ctx.adapter_dtype) if lora_A is None else lora_A
            lora_B = dy.new_empty((N, rank), dtype=ctx.adapter_dtype) if lora_B is None else lora_B
            u = dy.new_empty((M, rank), dtype=accumulate_dtype(dy.dtype)) if u is None else u
            tensors = _cast_base(kind, (t for t in base if t is not None), dtype)
            x = None if x is None else rows_of(x, dy.dtype)
            dx, dA, dB, dbias, dscales = _bwd(
                dy, x, u, h, tensors, kind, lora_A, lora_B, scaling, dropout_p, seed, list(scales), list(need)
            )
            grads = [g if n else None for g, n in zip((dx, dA, dB, dbias, *dscales), need)]
        dx, dA, dB, dbias, *dscales = grads
        if dx is not None:
            dx = cast(dx.view(ctx.x_shape), ctx.x_dtype)
        if dbias is not None:
            dbias = cast(dbias, ctx.bias_dtype)
        dscales = [None if g is None else cast(g, t.dtype) for g, t in zip(dscales, scales)]
        return (*[None] * 5, dx, dA, dB, dbias, *dscales, *[None] * (1 + len(base)))


def _scaled(d: Tensor | None, scaling: Tensor, R: int, x: Tensor) -> Tensor:
    # A tensor of one element becomes part of d: O(R), differentiable, never read by the host.
    if not scaling.is_floating_point():
        raise TypeError(f"scaling must be a float or a floating point tensor, got dtype {scaling.dtype}")
    if scaling.numel() != 1:
        raise ValueError(f"scaling must have one element, got shape {tuple(scaling.shape)}")
    if scaling.device != x.device:
        raise ValueError(f"scaling is on {scaling.device}, expected {x.device} like x")
    dtype = accumulate_dtype(x.dtype)
    folded = scaling.to(dtype).reshape(1)
    return folded.expand(R) if d is None else folded * d.to(dtype)


def _traced(x: Tensor, base: Base, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, options: Options, s: Scales):
    # In torch's own ops: what torch.jit.trace records runs, and trains, where this package is not installed.
    def times(t, scale):
        return t if scale is None else t * scale.to(t.dtype)

    linear = torch.nn.functional.linear
    W = kind_of(base.kind).dequantise(base.tensors, x.dtype)
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
        check_tensor("weight" if base.kind == "dense" else f"{base.kind}[{i}]", t)
    for name, value in tensors.items():
        if value is not None or name in ("lora_A", "lora_B"):
            check_tensor(name, value)


def _cast_all(tensors: tuple[Tensor | None, ...], dtype: torch.dtype, other: torch.dtype) -> tuple[Tensor | None, ...]:
    # What is neither in fp32 nor in autocast's dtype becomes ``other``.
    return tuple(t if t is None or t.dtype in (torch.float32, dtype) else t.to(other) for t in tensors)


def lora_linear_with(
    x: Tensor, weight: Tensor | Base, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None = None,
    options: Options = _PLAIN_OPTIONS, coefficients: Mapping[str, Tensor | None] | None = None,
) -> Tensor:  # fmt: skip
    """``lora_linear`` on any base, with coefficients by name: rows of peftkern/equation.py. Raises as ``lora_linear``."""
    no_transforms("lora_linear")
    base, now = base_of(weight), current() if nobody_watches() else None
    plain = (
        type(x) in _PLAIN
        and type(lora_A) in _PLAIN
        and type(lora_B) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
    )
    if now is None or not plain or coefficients:
        _check(x, base, {"lora_A": lora_A, "lora_B": lora_B, "bias": bias, **(coefficients or {})})
    scaling, dropout_p, seed = options
    scales = None if coefficients is None else tuple(fold(coefficients, x))
    if now is None and torch._C._get_tracing_state() is not None:
        return _traced(x, base, lora_A, lora_B, bias, options, Scales(*(scales or NO_SCALES)))
    if type(scaling) is not float:
        if isinstance(scaling, Tensor):
            d, *others = scales or NO_SCALES
            scales, scaling = (_scaled(d, scaling, lora_A.shape[0], x), *others), 1.0
        else:
            check_number("scaling", scaling)
            scaling = float(scaling)
    seed = seed_tensor(seed, x.device) if dropout_p > 0.0 else None
    dtype = autocast_dtype(x)
    if dtype is not None:
        lora_A, lora_B, bias = _cast_all((lora_A, lora_B, bias), dtype, dtype)
        scales = None if scales is None else _cast_all(scales, dtype, torch.float32)
    if torch.is_grad_enabled():
        for t in base.tensors:
            if t.requires_grad:
                raise ValueError(
                    "weight requires grad, but gets no gradient here: freeze it with requires_grad_(False)"
                )
        for t in (x, lora_A, lora_B, bias, *(scales or ())):
            if t is not None and t.requires_grad:
                return LoRALinearFunction.apply(
                    now, base.kind, scaling, dropout_p, dtype, x, lora_A, lora_B, bias, *(scales or NO_SCALES), seed,
                    *base.tensors,
                )  # fmt: skip
    call = Call(now, base, scaling, dropout_p, seed, dtype, scales)
    return call.forward(x if dtype is None else cast(x, dtype), lora_A, lora_B, bias, False, False)


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

    ``torch.jit.trace`` records torch's own ops, with torch's dropout.
    """
    if type(dropout_p) is not float or dropout_p != 0.0:
        check_p(dropout_p)
        dropout_p = float(dropout_p) if training else 0.0
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

"""A bottleneck adapter as a differentiable function.

Saved for backward, each only if a gradient that is needed reads it: h, or a copy of it where that costs less (``saved.py``);
t, the input of the activation, which is (M, R) in fp32; parameters and a seed. Dropout bits are drawn again from the seed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...activations import CODES, activation_name
from ...backends.cpu import call as native
from ...checks import accumulate_dtype, check_factor, check_fits, check_number, check_tensor
from ...dispatch.registry import caller
from ...dispatch.watch import nobody_watches
from ...ops.bottleneck_adapter import BottleneckNeeds
from ...ops.dropout_mask import acting, seed_tensor
from ...settings import Settings, current
from ..saved import first_only, kept_input, read_saved
from ..shapes import as_shape, autocast_dtype, cast, escaped, no_transforms, rows_of, unlooked

_fwd, _bwd = caller("bottleneck_adapter_fwd"), caller("bottleneck_adapter_bwd")

# What a node saves, by name, for messages.
_SAVED = ("h", "t", "down", "up", "up_bias", "gate", "out_scale", "seed")
_PARTS = ("down", "up", "down_bias", "up_bias", "gate", "out_scale")


class Call(NamedTuple):
    """What a pass takes besides tensors. ``now``: the settings, None if somebody watches which ops are called.

    ``dtype``: of the activation, h and the residual promoted.
    """

    now: Settings | None
    activation: str
    scaling: float
    dropout_p: float
    on_input: bool
    dtype: torch.dtype

    def forward(self, h: Tensor, residual: Tensor | None, parts, seed: Tensor | None, want_t: bool):
        """(y, t) of h and a residual in ``dtype``, or y alone unless t is wanted."""
        now, activation, *options = self[:5]
        if now is not None:
            done = native.bottleneck_forward(
                now, torch.get_num_threads(), h, residual, *parts, CODES[activation], *options, seed, want_t
            )
            if done is not None:
                return done
        rows = None if residual is None else rows_of(residual, self.dtype)
        y, t = _fwd(rows_of(h, self.dtype), rows, *parts, activation, *options, seed)
        y = as_shape(y, h)
        return (y, t) if want_t else y


@functools.cache
def _reads(needs: tuple[bool, ...]) -> tuple[bool, ...]:
    # Which of _SAVED the gradients of (h, residual, down, up, down_bias, up_bias, gate, out_scale) read.
    h, _, down, up, down_bias, up_bias, gate, scale = needs
    before, after = h or down or down_bias, up or up_bias or scale
    matrix_up = before or gate or scale
    return (
        down,
        before or up or gate or scale,
        h,
        matrix_up,
        gate or scale,
        before or after,
        before or gate or up or up_bias,
        True,
    )


@functools.cache
def _bits(needs: tuple[bool, ...]) -> int:
    """The same as the native entry takes them, the residual left out: a bit each."""
    return sum(1 << i for i, need in enumerate(needs[:1] + needs[2:]) if need)


class BottleneckAdapterFunction(torch.autograd.Function):
    """The op with its gradients.

    ``residual``: None for h. ``rest``: down, up, down_bias, up_bias, gate, out_scale, the seed and the ``Call``.
    """

    @staticmethod
    def forward(ctx, h, residual, *rest):
        *parts, seed, call = rest
        given, added = cast(h, call.dtype), None if residual is None else cast(residual, call.dtype)
        y, t = call.forward(given, added, parts, seed, True)
        down, up, _, *vectors = parts
        saved = [h, t, down, up, *vectors, seed]
        if not torch.compiler.is_compiling():  # a compiler drops what it does not need by itself
            saved = [v if read else None for v, read in zip(saved, _reads(ctx.needs_input_grad[:8]))]
            if saved[0] is not None:
                saved[0] = kept_input(h, given, call.now)
        ctx.save_for_backward(*saved)
        ctx.call, ctx.h = call, (h.shape, h.dtype)
        ctx.others = [None if v is None else (v.shape, v.dtype) for v in (residual, *parts)]
        ctx.inputs = 1 if residual is None else 2
        return y

    @staticmethod
    @first_only("bottleneck_adapter")
    def backward(ctx, dy):
        saved, needs = read_saved(ctx, "bottleneck_adapter", lambda: _SAVED, lambda n: _reads(n[:8]))
        residual, _, _, *vectors = ctx.others
        needs, grads = needs[:8], (None,) * 7
        if needs[0] or any(needs[2:]):
            grads = _gradients(ctx, cast(dy, ctx.call.dtype), saved, needs)
        dh, ddown, dup, *dvectors = grads
        dvectors = [None if grad is None else cast(grad, v[1]) for grad, v in zip(dvectors, vectors)]
        dh = None if dh is None else cast(dh, ctx.h[1])
        return dh, cast(dy, residual[1]) if needs[1] else None, ddown, dup, *dvectors, None, None


_apply = unlooked(BottleneckAdapterFunction)


def _gradients(ctx, dy: Tensor, saved: tuple, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """In the order of ``BottleneckNeeds``, None where not needed."""
    h, t, down, up, *rest, seed = saved
    now, activation, *options, dtype = ctx.call
    residual, (shape, matrix_dtype), (up_shape, _), *_ = ctx.others
    h = None if h is None else cast(h, dtype)
    if now is not None and nobody_watches():
        done = native.bottleneck_backward(
            current(), torch.get_num_threads(), dy, h, t, down, up, *rest, CODES[activation], *options, seed, residual is None,
            _bits(needs), shape[1], shape[0], matrix_dtype,
        )  # fmt: skip
        if done is not None:
            return done
    # What no needed gradient reads stands as a matrix of no memory.
    rows, need = rows_of(dy, dtype), BottleneckNeeds(needs[0], *needs[2:])
    down = rows.new_empty(1, dtype=matrix_dtype).expand(shape) if down is None else down
    up = rows.new_empty(1, dtype=matrix_dtype).expand(up_shape) if up is None else up
    if t is None:
        t = rows.new_empty(1, dtype=accumulate_dtype(dtype)).expand(rows.shape[0], shape[0])
    h = None if h is None else rows_of(h, dtype)
    done = _bwd(rows, h, t, down, up, *rest, activation, *options, seed, residual is None, list(need))
    dh, *others = (grad if wanted else None for grad, wanted in zip(done, need))
    return None if dh is None else dh.view(ctx.h[0]), *others


def _folded(scaling: Tensor, out_scale: Tensor | None, up: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    # A trained factor as a vector (N), whose autograd torch sees to.
    check_factor("scaling", scaling, h.device, "h")
    acc, N = accumulate_dtype(h.dtype), up.shape[:1].numel()
    scaling = scaling.reshape(1).to(acc)
    if out_scale is None:
        return scaling.expand(N)
    check_fits("out_scale", out_scale, (N,), "(N,)", h.device, (dtype, torch.float32))
    return scaling * out_scale.to(acc)


def _rows_gate(gate: Tensor, h: Tensor) -> Tensor:
    check_tensor("gate", gate)
    try:
        return gate.expand(*h.shape[:-1], 1).reshape(h.shape[:-1].numel())
    except RuntimeError:
        expected = f"what broadcasts to (..., 1) = {(*h.shape[:-1], 1)}"
        raise ValueError(f"gate has shape {tuple(gate.shape)}, expected {expected}") from None


def bottleneck_adapter(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "relu",
    scaling: float | Tensor = 1.0,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    out_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_on: str = "output",
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A bottleneck adapter in the residual stream.

        y = residual + gate * drop(scaling * out_scale * (f(h D^T + down_bias) U^T + up_bias))

    The adapter of Houlsby et al. (2019), Pfeiffer et al. (2020), He et al. (2022, parallel), AdapterPlus (out_scale) and UniPELT
    (gate); with ``residual`` the output of a linear layer that reads h, the parallel adapter of LLM-Adapters.

    Args:
        h: (..., K) in fp32, bf16 or fp16 (fp64 through the reference).
        down: D (R, K). up: U (N, R). Both in fp32 or both in h's dtype.
        down_bias: (R). up_bias: (N). out_scale: (N). In fp32 or h's dtype.
        activation: f: relu, gelu, gelu_tanh, silu, tanh, leaky_relu, sigmoid or identity (peftkern/activations.py).
        scaling: a float or a one-element tensor on h's device (differentiable, not synchronised to the host).
        residual: (..., N), what is added to; None: h itself, and N is K.
        gate: what broadcasts to (..., 1), such as (batch, 1, 1) of one value for each sequence.
        dropout_p: drop probability, acts if ``training`` and > 0, on the ``dropout_on`` "output" (what is added) or "input" (h).
        seed: int or one-element int64 tensor on h's device; the bits are those of ``dropout_mask`` for the flattened (M, N) or
            (M, K). None draws one from torch's default generator, only if dropout acts.

    Returns:
        (..., N) in the dtype of h and residual, promoted. Every argument but a float and a seed is differentiable; each
        gradient has its argument's dtype. Autocast changes nothing but parameters in another half precision than h, which
        are cast to h's.

    Raises:
        ValueError, TypeError: an argument that does not fit, named in the message.
        RuntimeError: a second derivative, or use under a torch.func transform; in backward, an h that was changed in place
            since and is needed as it was.
        NotImplementedError: an argument with a tangent of forward-mode AD.
    """
    now = current() if nobody_watches() else None
    if now is None:
        no_transforms("bottleneck_adapter")
    check_tensor("h", h)
    if dropout_on not in ("output", "input"):
        raise ValueError(f"dropout_on is {dropout_on!r}, expected 'output' or 'input'")
    p, dtype = acting(dropout_p, training), h.dtype
    residual = None if residual is h else residual
    if residual is not None:
        check_tensor("residual", residual)
        if residual.shape[:-1] != h.shape[:-1]:
            raise ValueError(
                f"residual has shape {tuple(residual.shape)}, expected (..., N) with ... = {tuple(h.shape[:-1])}"
            )
        dtype = torch.promote_types(dtype, residual.dtype)
    check_tensor("up", up)
    gate = None if gate is None else _rows_gate(gate, h)
    parts = [down, up, down_bias, up_bias, gate, out_scale]
    for name, v in zip(_PARTS, parts):
        if v is not None and not isinstance(v, Tensor):
            check_tensor(name, v)
    if autocast_dtype(h) is not None:
        allowed = (dtype, torch.float32)
        parts = [v if not isinstance(v, Tensor) or v.dtype in allowed else v.to(dtype) for v in parts]
    elif dtype != h.dtype:  # a residual in more precision
        parts = [v.to(dtype) if isinstance(v, Tensor) and v.dtype == h.dtype else v for v in parts]
    if isinstance(scaling, Tensor):
        parts[-1], scaling = _folded(scaling, parts[-1], up, h, dtype), 1.0
    else:
        check_number("scaling", scaling)
    seed = seed_tensor(seed, h.device) if p > 0.0 else None
    call = Call(now, activation_name(activation), float(scaling), p, dropout_on == "input", dtype)
    if torch.is_grad_enabled():
        for v in (h, residual, *parts):
            if v is not None and v.requires_grad:
                apply = BottleneckAdapterFunction.apply if now is None or escaped(h) else _apply
                return apply(h, residual, *parts, seed, call)
    return call.forward(cast(h, dtype), None if residual is None else cast(residual, dtype), parts, seed, False)

"""lora_linear as a differentiable function.

Saved for backward, each only if a gradient that is needed reads it (``_reads``): x, or a copy of it where that costs less
(``saved.py``); u, which is (M, R) in fp32; the base product, (M, N), only if base_out_scale trains; parameters and a
seed. Dropout bits are drawn again from the seed in backward.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..dispatch.registry import caller
from ..ops.checks import accumulate_dtype, check_number, check_tensor
from ..ops.dropout_mask import check_p, seed_tensor
from ..ops.lora_linear import check_base
from .saved import kept_input, read_saved

_fwd, _bwd_adapter, _bwd_input = (caller(f"lora_linear_{part}") for part in ("fwd", "bwd_adapter", "bwd_input"))
_REQUIRED = ("lora_A", "lora_B")
_VECTORS = ("rank_scale", "base_in_scale", "delta_in_scale", "base_out_scale", "delta_out_scale")
_TENSORS = (*_REQUIRED, "bias", *_VECTORS)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    # Not -1: with no columns torch could not tell the number of rows.
    t = _cast(t, dtype)
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _as_shape(y: Tensor, x: Tensor) -> Tensor:
    # Not a view for autograd: the output may be changed in place (nn.ReLU(inplace=True)), as F.linear's may.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])


_SAVED = ("x", "weight", "lora_A", "lora_B", "u", "h", "seed", *_VECTORS)


@functools.cache
def _reads(needs: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which of ``_SAVED`` the needed gradients read. Of a vector that needs one, its dtype."""
    (x, _, A, B, _, _, _, _, rank, base_in, delta_in, base_out, delta_out, _) = needs
    dx = x or base_in
    du, H = dx or A or delta_in, B or delta_out
    return (
        A or delta_in or base_in, dx, dx or delta_in, du or rank or delta_out, H or rank, base_out, True,
        du or H or rank, dx, dx or A or delta_in, dx or base_out, du or rank or H,
    )  # fmt: skip


def _unread(t: Tensor | None, dy: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    # What no gradient reads was not saved. An op then uses its shape alone; uninitialised memory costs nothing.
    return dy.new_empty(size, dtype=dtype) if t is None else t


class LoRALinearFunction(torch.autograd.Function):
    """The op with its gradients. ``dtype``: what x and weight are cast to, inside, so that weight is saved as it is."""

    @staticmethod
    def forward(
        ctx, x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed,
        rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale, dtype,
    ):  # fmt: skip
        needs = ctx.needs_input_grad
        need_base_out = needs[11]
        rows = _rows(x, dtype)
        y, u, h = _fwd(
            rows, _cast(weight, dtype), lora_A, lora_B, bias, scaling, dropout_p, seed,
            rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale, need_base_out,
        )  # fmt: skip
        if torch.compiler.is_compiling():
            kept, read = x, (True,) * len(_SAVED)  # a compiler drops what it does not need by itself
        else:
            read = _reads(needs)
            kept = kept_input(x, rows) if read[0] else None
        ctx.save_for_backward(
            kept,
            weight if read[1] else None,
            lora_A if read[2] else None,
            lora_B if read[3] else None,
            u if read[4] else None,
            h if need_base_out else None,
            seed,
            rank_scale,
            base_in_scale,
            delta_in_scale,
            base_out_scale,
            delta_out_scale,
        )
        ctx.scaling, ctx.dropout_p, ctx.dtype = scaling, dropout_p, dtype
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.rank, ctx.adapter_dtype = lora_A.shape[0], lora_A.dtype
        ctx.bias_dtype = bias.dtype if bias is not None else None
        return _as_shape(y, x)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("lora_linear has no second derivative: call backward without create_graph=True")
        saved, needs = read_saved(ctx, "lora_linear", _SAVED, _reads)
        (x, weight, lora_A, lora_B, u, h, seed,
         rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale) = saved  # fmt: skip
        (need_x, _, need_A, need_B, need_bias, _, _, _,
         need_rank, need_base_in, need_delta_in, need_base_out, need_delta_out, _) = needs  # fmt: skip
        dy = _rows(dy, dy.dtype)
        rows = _rows(x, ctx.dtype) if x is not None else None
        lora_A = _unread(lora_A, dy, (ctx.rank, ctx.x_shape[-1]), ctx.adapter_dtype)
        lora_B = _unread(lora_B, dy, (dy.shape[1], ctx.rank), ctx.adapter_dtype)
        u = _unread(u, dy, (dy.shape[0], ctx.rank), accumulate_dtype(ctx.dtype))
        du, dA, dB, dbias, drank, ddelta_in, dbase_out, ddelta_out = _bwd_adapter(
            dy, rows if need_A or need_delta_in else None, u, h, lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed,
            rank_scale, delta_in_scale, delta_out_scale,
            need_A, need_B, need_bias, need_rank, need_delta_in, need_base_out, need_delta_out,
        )  # fmt: skip
        dx = dbase_in = None
        if need_x or need_base_in:
            dx, dbase_in = _bwd_input(
                dy, du, rows if need_base_in else None, _cast(weight, ctx.dtype), lora_A, ctx.dropout_p, seed,
                base_in_scale, delta_in_scale, base_out_scale, need_base_in,
            )  # fmt: skip
            dx = _cast(dx.view(ctx.x_shape), ctx.x_dtype) if need_x else None

        def vector(grad: Tensor | None, need: bool, like: Tensor | None) -> Tensor | None:
            return grad.to(like.dtype) if need else None

        return (
            dx,
            None,
            dA if need_A else None,
            dB if need_B else None,
            dbias.to(ctx.bias_dtype) if need_bias else None,
            None,
            None,
            None,
            vector(drank, need_rank, rank_scale),
            vector(dbase_in, need_base_in, base_in_scale),
            vector(ddelta_in, need_delta_in, delta_in_scale),
            vector(dbase_out, need_base_out, base_out_scale),
            vector(ddelta_out, need_delta_out, delta_out_scale),
            None,
        )


def _autocast_dtype(x) -> torch.dtype | None:
    # What autocast makes of F.linear's arguments (fp64 it leaves alone), None where it does nothing.
    device = x.device.type
    if x.dtype == torch.float64:
        return None
    usual = x.is_cpu or x.is_cuda
    active = (usual or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if active else None


def _fold_scaling(scaling: Tensor, rank_scale: Tensor | None, R: int, x: Tensor) -> Tensor:
    # A tensor of one element becomes part of d: O(R), differentiable, never read by the host.
    if not scaling.is_floating_point():
        raise TypeError(f"scaling must be a float or a floating point tensor, got dtype {scaling.dtype}")
    if scaling.numel() != 1:
        raise ValueError(f"scaling must have one element, got shape {tuple(scaling.shape)}")
    if scaling.device != x.device:
        raise ValueError(f"scaling is on {scaling.device}, expected {x.device} like x")
    dtype = accumulate_dtype(x.dtype)
    folded = scaling.to(dtype).reshape(1)
    return folded.expand(R) if rank_scale is None else folded * rank_scale.to(dtype)


def _traced(
    x, weight, lora_A, lora_B, bias, scaling, dropout_p,
    rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale,
):  # fmt: skip
    # In torch's own ops: what torch.jit.trace records runs, and trains, where this package is not installed.
    def times(t, scale):
        return t if scale is None else t * scale.to(t.dtype)

    linear = torch.nn.functional.linear
    base = times(linear(times(x, base_in_scale), weight), base_out_scale)
    dropped = times(torch.nn.functional.dropout(x, dropout_p, dropout_p > 0.0).to(lora_A.dtype), delta_in_scale)
    delta = times(linear(times(linear(dropped, lora_A), rank_scale), lora_B), delta_out_scale)
    y = base + scaling * delta
    return (y if bias is None else y + bias).to(base.dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor,
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
        weight: (N, K) in x's dtype. Frozen: it gets no gradient.
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
    if torch._C._functorch.maybe_current_level() is not None and not torch.compiler.is_compiling():
        raise RuntimeError(
            "lora_linear does not support torch.func transforms (grad, vmap, jvp); call it outside of them"
        )
    if torch._C._get_tracing_state() is not None:
        return _traced(
            x, weight, lora_A, lora_B, bias, scaling, dropout_p if training else 0.0,
            rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale,
        )  # fmt: skip
    check_base(x, weight)
    named = zip(
        _TENSORS, (lora_A, lora_B, bias, rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale)
    )
    for name, value in named:
        # Shapes, dtypes and devices are checked by the op; what is read of a tensor here needs a tensor.
        if not isinstance(value, Tensor) and (value is not None or name in _REQUIRED):
            check_tensor(name, value)
    grad = torch.is_grad_enabled()
    if grad and weight.requires_grad:
        raise ValueError("weight requires grad, but gets no gradient here: freeze it with requires_grad_(False)")
    check_p(dropout_p)
    dropout_p = float(dropout_p) if training else 0.0
    seed = seed_tensor(seed, x.device) if dropout_p > 0.0 else None
    if isinstance(scaling, Tensor):
        rank_scale = _fold_scaling(scaling, rank_scale, lora_A.shape[0], x)
        scaling = 1.0
    check_number("scaling", scaling)
    scaling = float(scaling)
    vectors = (rank_scale, base_in_scale, delta_in_scale, base_out_scale, delta_out_scale)
    dtype = _autocast_dtype(x)
    if dtype is None:
        dtype = x.dtype
        if weight.dtype != dtype:
            raise TypeError(f"weight has dtype {weight.dtype}, expected {dtype} like x")
    else:
        kept = (torch.float32, dtype)
        lora_A, lora_B, bias = (t if t is None or t.dtype in kept else t.to(dtype) for t in (lora_A, lora_B, bias))
        vectors = tuple(t if t is None or t.dtype in kept else t.float() for t in vectors)
    if grad and any(t is not None and t.requires_grad for t in (x, lora_A, lora_B, bias, *vectors)):
        return LoRALinearFunction.apply(
            x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, *vectors, dtype
        )  # fmt: skip
    y, _, _ = _fwd(
        _rows(x, dtype), _cast(weight, dtype), lora_A, lora_B, bias, scaling, dropout_p, seed, *vectors, False
    )
    return _as_shape(y, x)

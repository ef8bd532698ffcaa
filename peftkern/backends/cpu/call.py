"""Passes of lora_linear and of bottlenecks, row norms and rotated blocks as one native call each: tensors in, tensors out
(csrc/bindings/).

    y                 = forward(settings, threads, x, kind, weight, A, B, bias, scaling, dropout_p, seed, scales, False, False)
    y, u, h           = forward(..., want_u, want_h)        u and h: None unless wanted
    dx, dA, dB, ...   = backward(settings, threads, dy, x, u, h, kind, weight, A, B, scaling, dropout_p, seed, scales,
                                 needs, K, R, adapter_dtype)
    norm              = row_norm(threads, kind, weight, A, B, scaling)
    y                 = block_rotate(threads, x, R, index)
    dR                = block_rotate_grad(threads, x, dy, size, index)
    R or dupper       = skew_series(threads, upper, rows, cols, size, c, d)
    y                 = bottleneck_forward(settings, threads, h, residual, down, up, down_bias, up_bias, gate, out_scale,
                                           activation, scaling, dropout_p, on_input, seed, False)
    y, t              = bottleneck_forward(..., want_t)
    dh, ddown, ...    = bottleneck_backward(settings, threads, dy, h, t, down, up, up_bias, gate, out_scale, activation,
                                            scaling, dropout_p, on_input, seed, through, needs, K, R, matrix_dtype)

All return None for a call that is not ordinary (a subclass, another device, shapes that do not fit ...), those with settings
also for one that nobody has looked at yet: the caller then checks and chooses with care, and hands its choice to
``learn_forward`` and the like (the same arguments, the kind of product, and whether a branch is computed by products of
bf16: peftkern/dispatch/cpu_base.py).
Shapes, dtypes and strides are checked natively at every call; what is looked up is the choice alone, under everything that
it may depend on.

settings: any object, compared by identity. kind: of the base (peftkern/bases); weight: what ``weight_of`` makes of its tensors.
scales: None, or a tuple in the order of equation.Scales. needs: bit i stands for field i of equation.Needs; what no needed
gradient reads may be None. Gradients come in the same order, None where not needed: dx like dy, dA and dB in the adapters'
dtype, those of vectors in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import marshal
from .native import _C

# Bytes of a scaled copy of the left side of torch's product.
_SCALED_BYTES = 16 << 20


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    # MKL sums a narrow fp32 product in chains up to six times less accurate than those of its transpose.
    if out.shape[1] < 16 and out.dtype == torch.float32:
        out.copy_(torch.mm(b.t(), a.t()).t())
    else:
        torch.mm(a, b, out=out)


def vendor_product(a: Tensor, b: Tensor, in_scale: Tensor | None, out: Tensor) -> None:
    """``out = (a * in_scale) b`` by torch, for a (M, C) with C > 0 and a b (C, D) of any strides."""
    if in_scale is None:
        _mm(a, b, out)
        return
    M, C = a.shape
    rows = min(M, max(_SCALED_BYTES // (C * a.element_size()), 1))
    scaled = torch.empty((rows, C), dtype=a.dtype)
    for r in range(0, M, rows):
        part = scaled[: min(rows, M - r)]
        torch.mul(a[r : r + rows], in_scale, out=part)
        _mm(part, b, out[r : r + rows])


def _product(a: Tensor, weight: Tensor, transpose: bool, in_scale: Tensor | None, out: Tensor) -> None:
    # Only where torch's libraries do not export their product.
    if a.numel() and out.numel():
        rows = a.reshape(-1, a.shape[-1])
        vendor_product(rows, weight.t() if transpose else weight, in_scale, out.view(rows.shape[0], -1))


def set_up(*, exports: bool = True) -> str | None:
    """Bring the native entries to this torch (``marshal.set_up``); None, or why there are none."""
    if _C is None:
        return "the C++ extension is not built"
    return marshal.set_up(_C, _product, exports=exports)


def nothing(*args) -> None:
    """A native entry that is not there, or what there is to learn of a call for which nothing is chosen."""


unavailable = set_up()
if unavailable is None:
    forward, learn_forward = _C.lora_linear_forward, _C.lora_linear_forward_learn
    backward, learn_backward = _C.lora_linear_backward, _C.lora_linear_backward_learn
    row_norm = _C.lora_row_norm
    block_rotate, block_rotate_grad, skew_series = _C.block_rotate, _C.block_rotate_grad, _C.skew_series
    bottleneck_forward, learn_bottleneck_forward = _C.bottleneck_forward, _C.bottleneck_forward_learn
    bottleneck_backward, learn_bottleneck_backward = _C.bottleneck_backward, _C.bottleneck_backward_learn
else:
    forward = learn_forward = backward = learn_backward = row_norm = nothing
    block_rotate = block_rotate_grad = skew_series = nothing
    bottleneck_forward = learn_bottleneck_forward = bottleneck_backward = learn_bottleneck_backward = nothing


def weight_of(base: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...] | None:
    """A base's tensors as native entries take them: the one that there is, all of a quantised weight, None if none."""
    return base[0] if len(base) == 1 else tuple(base) or None


def kind_of(c, way) -> str:
    """Who computes the base product of an op's arguments, on the way that was chosen for them."""
    if not c.base:
        return c.kind
    return way.strided if c.kind == "dense" and 1 not in c.base[0].stride() else way.kind


def answered(entry, learn, args: tuple, *choice: str | bool):
    """The entry's result: asked again when it knows the choice, and with copies of what it does not take as it is.

    What has rows at no constant step, or is no plain tensor, is copied: rare, and never wrong.
    """
    for careful in (False, True):
        given = marshal.copied(args) if careful else args
        done = entry(*given)
        if done is None and learn(*given, *choice):
            done = entry(*given)
        if done is not None:
            return done
    raise RuntimeError(f"the C++ extension takes no call like this one: {unavailable or 'arguments do not fit'}")

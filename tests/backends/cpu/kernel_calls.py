"""The C++ kernels one by one, with tensors: pointers, strides, threads, scratch. The native passes are made of these.

The kernels read an adapter as a *panel*: fp32, one row per rank, rows padded with zeros to a multiple of 16 columns.
``A`` (R, K) often is one as it stands; ``B^T`` (R, N) is packed once per call. Scales are folded in while packing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.backends.cpu import call, native
from peftkern.backends.cpu.call import vendor_product
from peftkern.backends.cpu.native import _C
from peftkern.backends.marshal import CODES
from peftkern.bases.base import Base

_PAD = 16
# Below this many multiply-adds, waking a second thread costs more than it saves.
_SERIAL_WORK = 1 << 17

# epilogue(row0, row1, col0, col1, panel): the raw product of out[row0:row1, col0:col1] is complete. ``panel`` is that
# block in fp32 (rows x cols, stride(1) == 1; scratch that is reused after the call) and the epilogue writes ``out``;
# or None: the product already lies in ``out``, in its dtype, and the epilogue works in place.
# The blocks of one call cover ``out`` once, in a fixed order; they are never empty, and col0 is a multiple of 32.
Epilogue = Callable[[int, int, int, int, "Tensor | None"], None]


class Dropout(NamedTuple):
    """What the kernels need to draw the bits again; ``threshold == 0`` keeps everything."""

    seed: int = 0
    threshold: int = 0
    scale: float = 1.0

    @staticmethod
    def of(p: float, seed: Tensor | None) -> Dropout:
        """Of a probability and a one-element seed."""
        if p == 0.0:
            return NO_DROPOUT
        return Dropout(int(seed.item()) & (2**64 - 1), int(p * 2.0**32), 1.0 / (1.0 - p))


NO_DROPOUT = Dropout()


def threads(work: int) -> int:
    """Threads for ``work`` multiply-adds: torch's number, or one if that is not worth it."""
    return torch.get_num_threads() if work > _SERIAL_WORK else 1


def pointer(t: Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if t is None else t.data_ptr()


def vector(t: Tensor | None) -> Tensor | None:
    """A scale vector or bias in contiguous fp32."""
    return None if t is None else t.to(torch.float32).contiguous()


def scale_copy(
    src: Tensor, out: Tensor, *, alpha: float = 1.0, row_scale: Tensor | None = None, col_scale: Tensor | None = None,
    pad: int = 0,
) -> None:  # fmt: skip
    """``out[r, c] = alpha row_scale[r] col_scale[c] src[r, c]``, rounded to out's dtype; ``pad`` zero columns more.

    src, out (rows, cols) any strides; scales contiguous fp32 or None.
    """
    rows, cols = src.shape
    _C.scale_copy(
        src.data_ptr(), CODES[src.dtype], *src.stride(), out.data_ptr(), CODES[out.dtype], *out.stride(),
        rows, cols, pad, alpha, pointer(row_scale), pointer(col_scale), threads(4 * rows * cols),
    )  # fmt: skip


def panel(
    adapter: Tensor, *, alpha: float = 1.0, row_scale: Tensor | None = None, col_scale: Tensor | None = None
) -> Tensor:
    """The adapter (R, C) as a panel, times alpha and the scales: itself if it is one, else a packed copy."""
    R, C = adapter.shape
    plain = alpha == 1.0 and row_scale is None and col_scale is None
    if plain and adapter.dtype == torch.float32 and C % _PAD == 0 and adapter.stride(1) == 1 and adapter.stride(0) >= C:
        return adapter
    padded = math.ceil(C / _PAD) * _PAD
    out = torch.empty((R, padded), dtype=torch.float32)
    scale_copy(adapter, out[:, :C], alpha=alpha, row_scale=row_scale, col_scale=col_scale, pad=padded - C)
    return out


def reduce(
    t: Tensor, *, dropout: Dropout = NO_DROPOUT, p: Tensor | None = None, out: Tensor | None = None,
    alpha_dot: float = 1.0, v: Tensor | None = None, g: Tensor | None = None, alpha_outer: float = 1.0,
    colsum: Tensor | None = None,
) -> None:  # fmt: skip
    """One pass over ``t`` (M, C), any strides.

    p (R, C) panel, out (M, R):      ``out = alpha_dot drop(t) p^T``
    v (M, R) contiguous, g (R, C):   ``g = alpha_outer v^T drop(t)``
    colsum (C):                      ``sum_i drop(t)[i]``
    """
    M, C = t.shape
    R = out.shape[1] if p is not None else v.shape[1] if v is not None else 0
    if M == 0 or C == 0 or (R == 0 and colsum is None):
        for result in (out, g, colsum):
            if result is not None:
                result.zero_()
        return
    _C.lora_reduce(
        t.data_ptr(), CODES[t.dtype], *t.stride(), M, C, R, dropout.seed, dropout.threshold,
        pointer(p), 0 if p is None else p.stride(0), pointer(out), alpha_dot,
        pointer(v), alpha_outer, pointer(g), pointer(colsum), threads(M * C * max(R, 1)),
    )  # fmt: skip


def expand(
    out: Tensor, *, src: Tensor | None, v: Tensor, p: Tensor, alpha: float = 1.0, dropout: Dropout = NO_DROPOUT,
    row0: int = 0, col0: int = 0, base_scale: Tensor | None = None, bias: Tensor | None = None,
) -> None:  # fmt: skip
    """``out = round(base_scale src + drop(alpha v p) + bias)`` for a block of rows and columns of a larger matrix.

    out (m, c) with stride(1) == 1 is the block at (row0, col0), col0 a multiple of 16. src: out itself, another block
    (fp32 or out's dtype, stride(1) == 1), or None for zero. v (M, R) contiguous, p (R, C) panel, base_scale (C),
    bias (C): whole.
    """
    m, c = out.shape
    if m == 0 or c == 0:
        return
    if col0 % _PAD:
        raise ValueError(f"col0 is {col0}, expected a multiple of {_PAD}")
    R, offset = v.shape[1], 4 * col0
    _C.lora_expand(
        out.data_ptr(), CODES[out.dtype], out.stride(0),
        pointer(src), 0 if src is None else CODES[src.dtype], 0 if src is None else src.stride(0),
        m, c, R, v.data_ptr() + 4 * row0 * R, p.data_ptr() + offset, p.stride(0), alpha,
        dropout.seed, dropout.threshold, row0, col0,
        base_scale.data_ptr() + offset if base_scale is not None else 0,
        bias.data_ptr() + offset if bias is not None else 0, threads(m * c * max(R, 1)),
    )  # fmt: skip


def column_dot(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """``out[c] (+)= sum_i a[i, c] b[i, c]``; a, b (M, C) any strides and dtypes, out (C) contiguous fp32."""
    M, C = a.shape
    if M == 0 or C == 0:
        if not accumulate:
            out.zero_()
        return
    _C.column_dot(
        a.data_ptr(), CODES[a.dtype], *a.stride(), b.data_ptr(), CODES[b.dtype], *b.stride(), M, C, out.data_ptr(),
        accumulate, threads(M * C),
    )  # fmt: skip


def base_product(
    a: Tensor, weight: Tensor, *, transpose: bool, in_scale: Tensor | None, out: Tensor, epilogue: Epilogue, kind: str
) -> None:
    """``out = (a * in_scale) W^T`` if ``transpose`` else ``(a * in_scale) W``, finished by ``epilogue``.

    a (M, C) any strides; weight (N, K) any strides; in_scale (C,) or None, fp32 or a.dtype; out (M, D) contiguous, in
    a.dtype, contents ignored. C, D = K, N if ``transpose`` (forward) else N, K. Nothing is called if out is empty; with
    C == 0 the product is zero.
    """
    (M, D), C, b = out.shape, a.shape[1], weight.t() if transpose else weight
    if out.numel() == 0:
        return
    if C == 0 or kind == "vendor":
        vendor_product(a, b, in_scale, out) if C else out.zero_()
        epilogue(0, M, 0, D, None)
        return
    many = threads(M * C * D)
    plan = native.blocks(kind, M, D, C, many)
    ld = plan.cols + 16
    panel, scratch, scale = torch.empty(plan.rows, ld), torch.empty(plan.scratch), vector(in_scale)
    for c0 in range(0, D, plan.cols):
        c1 = min(D, c0 + plan.cols)
        for r0 in range(0, M, plan.rows):
            r1 = min(M, r0 + plan.rows)
            _C.base_product(
                kind, a[r0:].data_ptr(), *a.stride(), b[:, c0:].data_ptr(), b.stride(1), b.stride(0), CODES[a.dtype],
                pointer(scale), panel.data_ptr(), ld, r1 - r0, c1 - c0, C, scratch.data_ptr(),
                plan.scratch, many,
            )  # fmt: skip
            epilogue(r0, r1, c0, c1, panel[: r1 - r0, : c1 - c0])


def forward(x: Tensor, base: Base, N: int, kind: str) -> Tensor:
    """Base(x) by a kind of product."""
    A, B = torch.zeros(1, x.shape[1]), torch.zeros(N, 1)
    args = (object(), 2, x, base.kind, call.weight_of(base.tensors), A, B, None, 1.0, 0.0, None, None, True, False)
    assert call.learn_forward(*args, kind)
    return call.forward(*args)[0]


def backward(dy: Tensor, base: Base, K: int, kind: str) -> Tensor:
    """The gradient of Base(x) for dy."""
    A, B = torch.zeros(1, K), torch.zeros(dy.shape[1], 1)
    u, x = torch.zeros(dy.shape[0], 1), dy.new_zeros(dy.shape[0], K)
    weight = call.weight_of(base.tensors)
    args = (object(), 2, dy, x, u, None, base.kind, weight, A, B, 1.0, 0.0, None, None, 1, K, 1, A.dtype)
    assert call.learn_backward(*args, kind)
    return call.backward(*args)[0]

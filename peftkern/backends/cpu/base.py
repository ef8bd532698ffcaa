"""The base product of lora_linear on CPU: ``(a * s) W^T`` (forward) or ``(a * s) W`` (input gradient), W frozen.

``base_product`` fills ``out`` block by block and calls ``epilogue`` when a block's product is complete, so that the
branch, the scales and the bias can be added while it is in cache and before the one rounding to half precision.
Who computes it is the caller's to say, in which blocks is decided in base_plan.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ...problem import CpuWay
from . import base_plan as plans
from .native import _C, CODES, pointer, vector

# epilogue(row0, row1, col0, col1, panel): the raw product of out[row0:row1, col0:col1] is complete. ``panel`` is that
# block in fp32 (rows x cols, stride(1) == 1; scratch that is reused after the call) and the epilogue writes ``out``;
# or None: the product already lies in ``out``, in its dtype, and the epilogue works in place.
# The blocks of one call cover ``out`` once, in a fixed order; they are never empty, and col0 is a multiple of 32.
Epilogue = Callable[[int, int, int, int, Tensor | None], None]

# Bytes of a scaled copy of a for the vendor's product.
_SCALED_BYTES = 16 << 20


class _Scratch(threading.local):
    """One fp32 buffer per thread, kept: fresh pages would cost more than the arithmetic of a small layer."""

    buffer: Tensor | None = None

    def take(self, size: int) -> Tensor:
        if self.buffer is None or self.buffer.numel() < size:
            self.buffer = None
            # A buffer that outlives an inference_mode block must not be an inference tensor.
            with torch.inference_mode(False):
                self.buffer = torch.empty(size, dtype=torch.float32)
        return self.buffer[:size]


_scratch = _Scratch()


def base_product(
    a: Tensor, weight: Tensor, *, transpose: bool, in_scale: Tensor | None, out: Tensor, epilogue: Epilogue, way: CpuWay,
) -> None:  # fmt: skip
    """``out = (a * in_scale) W^T`` if ``transpose`` else ``(a * in_scale) W``, finished by ``epilogue``.

    a (M, C) any strides; weight (N, K) any strides; in_scale (C,) or None, fp32 or a.dtype; out (M, D) contiguous, in
    a.dtype, contents ignored. C, D = K, N if ``transpose`` (forward) else N, K. All three matrices have one dtype of
    float32, bfloat16, float16. Nothing is called if out is empty; with C == 0 the product is zero.
    """
    M, D = out.shape
    C = a.shape[1]
    if out.numel() == 0:
        return
    if C == 0:
        out.zero_()
        epilogue(0, M, 0, D, None)
        return
    b = weight.t() if transpose else weight
    kind = way.kind if 1 in b.stride() else way.strided
    if kind == "vendor":
        vendor_product(a, b, in_scale, out)
        epilogue(0, M, 0, D, None)
    else:
        _ours(kind, a, b, vector(in_scale), epilogue)


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


def _ours(kind: str, a: Tensor, b: Tensor, in_scale: Tensor | None, epilogue: Epilogue) -> None:
    (M, C), D = a.shape, b.shape[1]
    threads = torch.get_num_threads() if M * C * D > 1 << 17 else 1
    plan = plans.blocks(kind, M, D, C, threads)
    ld = plan.cols + 16  # not a multiple of 4 KB: the rows of a tile would share one set of the cache
    buffer = _scratch.take(plan.scratch + plan.panel)
    panel = buffer[: plan.panel].view(plan.rows, ld)
    size, code, scale = a.element_size(), CODES[a.dtype], pointer(in_scale)
    for c0 in range(0, D, plan.cols):
        c1 = min(D, c0 + plan.cols)
        for r0 in range(0, M, plan.rows):
            r1 = min(M, r0 + plan.rows)
            _C.base_product(
                kind, a.data_ptr() + r0 * a.stride(0) * size, *a.stride(),
                b.data_ptr() + c0 * b.stride(1) * size, b.stride(1), b.stride(0), code, scale,
                panel.data_ptr(), ld, r1 - r0, c1 - c0, C, plan.block_rows, plan.block_cols,
                buffer.data_ptr() + 4 * plan.panel, plan.scratch, threads,
            )  # fmt: skip
            epilogue(r0, r1, c0, c1, panel[: r1 - r0, : c1 - c0])

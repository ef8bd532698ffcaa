"""int8 and w8a8: codes with a scale for each row.

    W[n, k] = q[n, k] * scale[n]        codes q int8 (N, K), any strides   scale fp32, bf16 or fp16 (N)

As torchao and quanto hold them. bitsandbytes holds SCB = 127 scale.

w8a8 is the same weight, but each row of what it meets is rounded to 8 bits first, so that its products are of integers:

    Base(x)     = round(x) W^T                  round(t)[m, :] = rint(t[m, :] / s[m]) * s[m], s[m] = max |t[m, :]| / 127
    Base^T(dy)  = round(dy * scale) q           a row with an infinity or a NaN is NaN

What is left out is at most s[m] / 2 an element. Of a row of normal x it is s[m] / sqrt(12) on average, s[m] about
max |x| / 127, which changes y by a relative RMS of about 0.01. W has no gradient, so nothing else is rounded: the
gradient is that of x W^T, at a dy in 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .packed import SCALES, Packed


class Int8(Packed):
    """W[n, k] = q[n, k] * scale[n]."""

    name = "int8"
    parts = ({"codes": (torch.int8,), "scale": SCALES},)

    def check(self, tensors: Sequence[Tensor], like: Tensor, K: int | None, N: int | None) -> tuple[int, int]:
        """(N, K) of the codes."""
        part = self.named(tensors, like)
        shape = self.matrix("codes", part["codes"], K, N)
        self.shaped("scale", part["scale"], shape[:1], "(N,)")
        return shape

    def dequantise(self, tensors: Sequence[Tensor], dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
        """W (N, K) in ``dtype``, computed in fp32."""
        codes, scale = tensors
        return (codes.float() * scale.float()[:, None]).to(dtype)


# Sums of so many products of codes fit 32 bits.
_MOST = 1 << 17
# What is smaller counts as this, as a largest magnitude: its inverse times 127 is finite.
_LEAST = 1e-30


class W8a8(Int8):
    """Int8 for rows that are rounded to 8 bits."""

    name = "w8a8"

    def check(self, tensors: Sequence[Tensor], like: Tensor, K: int | None, N: int | None) -> tuple[int, int]:
        """(N, K) of the codes, neither more than 131,072."""
        shape = super().check(tensors, like, K, N)
        if max(shape) > _MOST:
            raise ValueError(f"w8a8 codes have shape {shape}, expected at most {_MOST} rows and columns")
        return shape

    def operands(self, tensors: Sequence[Tensor], t: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        """(t rounded, W) in t's dtype, which is fp32 or fp64; or (t * scale rounded, codes) of the transpose."""
        codes, scale = (each.to(t.dtype) for each in tensors)
        return (_rounded(t * scale), codes) if transposed else (_rounded(t), codes * scale[:, None])


def _rounded(t: Tensor) -> Tensor:
    """t (M, C) with each row in whole steps of its largest magnitude / 127."""
    most = t.abs().amax(dim=1, keepdim=True).clamp(min=_LEAST) if t.numel() else t.new_ones(t.shape[0], 1)
    return (t * (most.reciprocal() * 127.0)).round() * (most / 127.0)

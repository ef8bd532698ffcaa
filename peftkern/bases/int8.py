"""int8: codes with a scale for each row.

    W[n, k] = q[n, k] * scale[n]        codes q int8 (N, K), any strides   scale fp32, bf16 or fp16 (N)

As torchao and quanto hold them. bitsandbytes holds SCB = 127 scale.
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

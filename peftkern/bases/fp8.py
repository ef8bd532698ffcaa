"""fp8: 8-bit floats with one scale, a scale for each row, or one for each block of 128 x 128.

W[n, k] = q[n, k] * s        s = scale[0],  scale[n]  or  scale[n // 128, k // 128]

codes q float8_e4m3fn or float8_e5m2 (N, K), any strides   scale fp32 (1), (N) or (ceil(N / 128), ceil(K / 128))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .packed import Packed

BLOCK = 128


class Fp8(Packed):
    """W[n, k] = q[n, k] * s."""

    name = "fp8"
    parts = ({"codes": (torch.float8_e4m3fn, torch.float8_e5m2), "scale": (torch.float32,)},)

    def check(self, tensors: Sequence[Tensor], like: Tensor, K: int | None, N: int | None) -> tuple[int, int]:
        """(N, K) of the codes."""
        part = self.named(tensors, like)
        N, K = self.matrix("codes", part["codes"], K, N)
        shape, blocks = tuple(part["scale"].shape), (-(-N // BLOCK), -(-K // BLOCK))
        if shape not in ((1,), (N,), blocks):
            raise ValueError(
                f"fp8 scale has shape {shape}, expected (1,), (N,) = ({N},) or (ceil(N / 128), ceil(K / 128)) = {blocks}"
            )
        return N, K

    def dequantise(self, tensors: Sequence[Tensor], dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
        """W (N, K) in ``dtype``, computed in fp32."""
        codes, scale = tensors
        if scale.dim() == 2:
            rows = scale.repeat_interleave(BLOCK, dim=0)[: shape[0]]
            scale = rows.repeat_interleave(BLOCK, dim=1)[:, : shape[1]]
        else:
            scale = scale[:, None]
        return (codes.float() * scale).to(dtype)

"""mxfp4: e2m1 codes with a power of two for each 32 elements of a row, as gpt-oss's checkpoints store a linear weight.

    W[n, 32 g + i] = e2m1[q[n, g, i]] * 2^(scales[n, g] - 127)

    blocks uint8 (N, K / 32, 16), contiguous: element 2 j of a block in the low nibble of byte j, 2 j + 1 in the high one
    scales uint8 (N, K / 32), contiguous; 255 is NaN (E8M0, OCP MX specification 1.0)

The checkpoints' experts (E, N, K / 32, 16) are such a weight each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .packed import Packed, nibbles

# Sign, two bits of exponent, one of mantissa.
E2M1 = tuple(sign * v for sign in (1.0, -1.0) for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
BLOCK = 32
# The scale of a block of NaN.
NAN = 255


class Mxfp4(Packed):
    """Blocks of 32 along K."""

    name = "mxfp4"
    parts = ({"blocks": (torch.uint8,), "scales": (torch.uint8,)},)

    def check(self, tensors: Sequence[Tensor], like: Tensor, K: int | None, N: int | None) -> tuple[int, int]:
        """(N, K) of the blocks."""
        part = self.named(tensors, like)
        blocks = part["blocks"]
        if blocks.dim() != 3 or blocks.shape[2] != BLOCK // 2:
            raise ValueError(f"mxfp4 blocks has shape {tuple(blocks.shape)}, expected (N, K / 32, 16)")
        N, K = blocks.shape[0] if N is None else N, blocks.shape[1] * BLOCK if K is None else K
        if K % BLOCK:
            raise ValueError(f"a base of kind mxfp4 has in_features that 32 divides, got K = {K}")
        self.shaped("blocks", blocks, (N, K // BLOCK, BLOCK // 2), "(N, K / 32, 16)")
        self.shaped("scales", part["scales"], (N, K // BLOCK), "(N, K / 32)")
        for name, t in part.items():
            self.bytes(name, t, t.numel(), "")
        return N, K

    def dequantise(self, tensors: Sequence[Tensor], dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
        """W (N, K) in ``dtype``, computed in fp32."""
        blocks, scales = tensors
        values = torch.tensor(E2M1, dtype=torch.float32, device=blocks.device)
        q = values.index_select(0, nibbles(blocks, high_first=False).flatten().int()).view(*scales.shape, BLOCK)
        return (q * scales.view(torch.float8_e8m0fnu).float()[..., None]).view(shape).to(dtype)

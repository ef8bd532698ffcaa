"""q4_0, q8_0: GGUF's blocks of 32 elements of a row with a scale d in fp16, byte for byte as the file has them.

W[n, 32 g + i] = q[n, g, i] * d[n, g]

raw uint8, N K / 32 blocks, contiguous, of any shape. A block of q4_0: 2 bytes d, 16 bytes of codes, byte j with
q + 8 of element j in the low nibble and of element j + 16 in the high one. A block of q8_0: 2 bytes d, 32 int8 q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .packed import Packed, known

BLOCK = 32


class Gguf(Packed):
    """Blocks of 32 along K. ``size``: bytes of one. ``codes``: q of the bytes behind d: (blocks, size - 2) uint8 -> (blocks, 32)
    int8."""

    sized = False
    parts = ({"raw": (torch.uint8,)},)
    size: int
    codes: Callable[[Tensor], Tensor]

    def check(self, tensors: Sequence[Tensor], like: Tensor, K: int | None, N: int | None) -> tuple[int, int]:
        """(N, K), of which K must be known."""
        raw = self.named(tensors, like)["raw"]
        N, K = known(self.name, raw.numel() // self.size * BLOCK, K, N)
        if K % BLOCK:
            raise ValueError(f"a base of kind {self.name} has in_features that 32 divides, got K = {K}")
        self.bytes("raw", raw, N * K // BLOCK * self.size, f"{self.size} N K / 32 for N = {N} and K = {K}")
        return N, K

    def dequantise(self, tensors: Sequence[Tensor], dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
        """W (N, K) in ``dtype``, computed in fp32."""
        blocks = tensors[0].view(tensors[0].numel() // self.size, self.size)
        d = blocks[:, :2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
        return (self.codes(blocks[:, 2:]).float() * d).view(shape).to(dtype)


class Q4(Gguf):
    """4 bits."""

    name, size = "q4_0", 18

    def codes(self, data: Tensor) -> Tensor:
        """The low nibbles, then the high ones, less 8."""
        return torch.cat((data & 15, data >> 4), dim=1).to(torch.int8) - 8


class Q8(Gguf):
    """8 bits."""

    name, size = "q8_0", 34

    def codes(self, data: Tensor) -> Tensor:
        """The bytes, with their sign."""
        return data.view(torch.int8)

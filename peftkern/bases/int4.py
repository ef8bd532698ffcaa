"""int4, hqq4 and quanto4: 4-bit codes with a scale and a zero for each group along K.

    W[n, k] = (q[n, k] - zero[n, k // g]) * scale[n, k // g]

int4, as torchao's plain layout has it:

    codes (N, K / 2), any strides, uint8 of q from 0 to 15 or int8 of q from -8 to 7 in two's complement: element 2 j of a row
          in the low nibble of byte j, 2 j + 1 in the high one
    scale, zero fp32, bf16 or fp16 (N, G), any strides, g = K / G

hqq4, as HQQ has it with axis=1: groups of g elements of the flat weight, which lie within rows where g divides K,

    codes uint8, N K / 2 bytes, contiguous, of any shape: element j of the flat weight in the high nibble of byte j, element
          j + N K / 2 in the low one
    scale, zero fp32, bf16 or fp16, N K / g elements, contiguous, of any shape

quanto4, as optimum-quanto has it along axis 0: the same, but for element j in the low nibble of byte j and element j + N K / 2
in the high one.

Computed in fp32; the libraries round each step to their compute dtype. GPTQ packs along K into columns of int32 and AWQ
interleaves: no view of theirs is one of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .packed import SCALES, Packed, known, nibbles


class Int4(Packed):
    """Groups of a row, pairs of neighbours."""

    name = "int4"
    parts = ({"codes": (torch.uint8, torch.int8), "scale": SCALES, "zero": SCALES},)

    def check(self, tensors: Sequence[Tensor], like: Tensor, K: int | None, N: int | None) -> tuple[int, int]:
        """(N, K) of the codes."""
        part = self.named(tensors, like)
        N, K = self.matrix("codes", part["codes"], K, N, packs=2)
        for name in ("scale", "zero"):
            t = part[name]
            if t.dim() != 2 or t.shape[0] != N or (K % t.shape[1] if t.shape[1] else K):
                raise ValueError(
                    f"int4 {name} has shape {tuple(t.shape)}, expected (N, G) with N = {N} and G a divisor of K = {K}"
                )
        self.shaped("zero", part["zero"], tuple(part["scale"].shape), "(N, G)")
        return N, K

    def dequantise(self, tensors: Sequence[Tensor], dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
        """W (N, K) in ``dtype``, computed in fp32."""
        codes, scale, zero = tensors
        groups = (*scale.shape, shape[1] // max(scale.shape[1], 1))
        q = nibbles(codes.view(torch.uint8), high_first=False).float().view(groups)
        if codes.dtype == torch.int8:
            q = torch.where(q > 7, q - 16, q)
        return ((q - zero.float()[..., None]) * scale.float()[..., None]).view(shape).to(dtype)


class Halves4(Packed):
    """Groups of the flat weight, pairs of elements of its halves; ``high_first``: the first half in the high nibbles."""

    parts = ({"codes": (torch.uint8,), "scale": SCALES, "zero": SCALES},)
    sized = False

    def __init__(self, name: str, high_first: bool) -> None:
        self.name, self.high_first = name, high_first

    def check(self, tensors: Sequence[Tensor], like: Tensor, K: int | None, N: int | None) -> tuple[int, int]:
        """(N, K), of which K must be known."""
        part = self.named(tensors, like)
        N, K = known(self.name, 2 * part["codes"].numel(), K, N)
        if N * K % 2:
            raise ValueError(f"a base of kind {self.name} has an even number of elements, got N = {N} and K = {K}")
        self.bytes("codes", part["codes"], N * K // 2, f"N K / 2 for N = {N} and K = {K}")
        groups = part["scale"].numel()
        if N * K % groups if groups else N * K:
            raise ValueError(f"{self.name} scale has {groups} elements, expected a divisor of N K = {N * K}")
        for name in ("scale", "zero"):
            self.bytes(name, part[name], groups, "that of scale")
        return N, K

    def dequantise(self, tensors: Sequence[Tensor], dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
        """W (N, K) in ``dtype``, computed in fp32."""
        codes, scale, zero = (t.flatten() for t in tensors)
        halves = (codes >> 4, codes & 15) if self.high_first else (codes & 15, codes >> 4)
        q = torch.cat(halves).float().view(scale.numel(), 2 * codes.numel() // max(scale.numel(), 1))
        return ((q - zero.float()[:, None]) * scale.float()[:, None]).view(shape).to(dtype)

"""nf4, fp4: 4-bit codes of 16 values with a scale for each block, as bitsandbytes holds them.

    W.flat[i] = code[q[i]] * absmax[i // b]

    codes uint8, ceil(N K / 2) bytes, contiguous, of any shape: element 2 j in the high nibble of byte j, 2 j + 1 in the low one
    absmax fp32 (blocks): blocks of b elements of the flat weight, which may straddle rows; the last may be shorter

or with quantised scales (nested), blocks of b2 scales:

    absmax[j] = code2[a[j]] * absmax2[j // b2] + offset

    codes   absmax a uint8 (blocks)   code2 fp32 (256)   absmax2 fp32 (ceil(blocks / b2))   offset fp32, one element

b is the power of two with ceil(N K / b) = blocks, b2 likewise.

Each step is rounded to fp32, and W is nowhere rounded to the checkpoint's dtype. This is the weight that the library's forward
multiplies by in fp32 compute. Its ``dequantize_4bit``, which its backward and its forward in other dtypes use, gives these values
rounded to the dtype that the weight had before: of a bf16 checkpoint, forward and backward differ there, not here.
Where b does not divide K, its kernel for CPUs (0.50.2) takes other scales than those of the layout, which its other kernels
read as it is read here: findings/bitsandbytes_cpu_blocks_across_rows.sh.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .packed import Packed, block_length, by_blocks, known, nibbles

# Quantiles of a normal distribution (Dettmers et al. 2023, appendix E), and e2m1 with a subnormal of 1/192 instead of 1/24,
# scaled to at most 1: bit 3 is the sign.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_E2M1 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(sign * v / 12.0 for sign in (1.0, -1.0) for v in _E2M1)

_BYTE, _FLOAT = (torch.uint8,), (torch.float32,)


class Codebook(Packed):
    """W.flat[i] = code[q[i]] * absmax[i // b]."""

    sized = False
    parts = (
        {"codes": _BYTE, "absmax": _FLOAT},
        {"codes": _BYTE, "absmax": _BYTE, "code2": _FLOAT, "absmax2": _FLOAT, "offset": _FLOAT},
    )

    def __init__(self, name: str, code: tuple[float, ...]) -> None:
        self.name, self.code = name, code

    def check(self, tensors: Sequence[Tensor], like: Tensor, K: int | None, N: int | None) -> tuple[int, int]:
        """(N, K), of which K must be known."""
        part = self.named(tensors, like)
        N, K = known(self.name, 2 * part["codes"].numel(), K, N)
        self.bytes("codes", part["codes"], (N * K + 1) // 2, f"ceil(N K / 2) for N = {N} and K = {K}")
        self._blocks("absmax", part["absmax"], N * K)
        if len(part) > 2:
            self.shaped("code2", part["code2"], (256,), "(256,)")
            self._blocks("absmax2", part["absmax2"], part["absmax"].numel())
            self.bytes("offset", part["offset"], 1, "one")
        return N, K

    def _blocks(self, part: str, t: Tensor, elements: int) -> None:
        self.bytes(part, t, t.numel(), "")
        if not block_length(elements, t.numel()):
            raise ValueError(
                f"{self.called(part)} has {t.numel()} blocks, expected ceil({elements} / b) of a power of two b"
            )

    def dequantise(self, tensors: Sequence[Tensor], dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
        """W (N, K) in ``dtype``, computed in fp32."""
        codes, absmax, *nested = tensors
        if nested:
            code2, absmax2, offset = nested
            scales = code2.index_select(0, absmax.flatten().int())
            absmax = by_blocks(scales, absmax2.flatten(), block_length(absmax.numel(), absmax2.numel())) + offset
        n = shape[0] * shape[1]
        code = torch.tensor(self.code, dtype=torch.float32, device=codes.device)
        values = code.index_select(0, nibbles(codes.flatten(), high_first=True)[:n].int())
        return by_blocks(values, absmax.flatten(), block_length(n, absmax.numel())).view(shape).to(dtype)

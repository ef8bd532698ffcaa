"""Tensors to the C++ kernels of the low-rank branch: pointers, strides, threads, scratch. No decisions beyond those.

The kernels read an adapter as a *panel*: fp32, one row per rank, rows padded with zeros to a multiple of 16 columns.
``A`` (R, K) often is one as it stands; ``B^T`` (R, N) is packed once per call. Scales are folded in while packing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ... import settings
from ...problem import CpuWay

try:
    from ... import _C
except ImportError:
    _C = None

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PAD = 16
# Below this many multiply-adds, waking a second thread costs more than it saves.
_SERIAL_WORK = 1 << 17
_NO_SCALE = 1.0


class Dropout(NamedTuple):
    """What the kernels need to draw the bits again; ``threshold == 0`` keeps everything."""

    seed: int = 0
    threshold: int = 0
    scale: float = 1.0

    @staticmethod
    def of(p: float, seed: Tensor | None) -> Dropout:
        if p == 0.0:
            return NO_DROPOUT
        return Dropout(int(seed.item()) & (2**64 - 1), int(p * 2.0**32), 1.0 / (1.0 - p))


NO_DROPOUT = Dropout()


# Most rows that the kernel for few rows takes.
FEW_ROWS = _C.base_few_rows if _C is not None else 0


class Level(NamedTuple):
    """The instruction sets in use, and whose fp32 product torch has: ours, torch's, whether it is MKL's."""

    isa: str
    torch_isa: str
    mkl: bool


def level() -> Level:
    """What is in use now."""
    return Level(_C.isa(), torch.backends.cpu.get_cpu_capability(), torch.backends.mkl.is_available())


def model() -> tuple[str, int, int]:
    """Vendor, family and model of this CPU."""
    return tuple(_C.cpu_model())


def facts(isa: str) -> tuple[Level, frozenset[str]]:
    """(level, features that decide which product is fast) with ``isa`` in use; ``bf16_kernel``: there is ours for bf16."""
    before = _C.isa()
    _C.set_isa(isa)
    try:
        return level(), frozenset(_C.features()) | ({"bf16_kernel"} if _C.base_gemm_bf16_usable() else set())
    finally:
        _C.set_isa(before)


def use_isa(wanted: str) -> None:
    """Bring the kernels to an instruction set, a value of ``PEFTKERN_CPU_ISA``."""
    _C.set_isa(wanted)


if _C is not None:
    settings.follow(lambda now: use_isa(now.cpu_isa))


def threads(work: int) -> int:
    """Threads for ``work`` multiply-adds: torch's number, or one if that is not worth it."""
    return torch.get_num_threads() if work > _SERIAL_WORK else 1


def pointer(t: Tensor | None) -> int:
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
    plain = alpha == _NO_SCALE and row_scale is None and col_scale is None
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


def dropout_mask(c, way: CpuWay) -> Tensor:
    """The keep bits of a seed as bool (M, K); see peftkern.ops.dropout_mask."""
    seed, M, K, p = c
    out = torch.empty((M, K), dtype=torch.bool)
    if out.numel():
        drop = int(seed.item()) & (2**64 - 1)
        _C.dropout_mask(drop, int(p * 2.0**32), M, K, out.data_ptr(), threads(out.numel()))
    return out

"""Bases as Triton's kernels take them: a kind of peftkern/bases as the one description that their loader reads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...bases.codebook import FP4, NF4
from ...bases.gguf import BLOCK as GGUF_BLOCK
from ...bases.mxfp4 import BLOCK as MX_BLOCK
from ...bases.mxfp4 import E2M1
from ...bases.packed import block_length

# The largest power of two that a tile could be wide.
_WIDEST = 1 << 12
_BYTES = {"RUN": 1, "RUN_BYTES": 1, "HALF": 1}
_PAIRS = {"RUN": 2, "RUN_BYTES": 1, "HALF": 1}


@functools.cache
def _table(kind: str, device: torch.device) -> Tensor:
    """fp32: what the codes of a kind stand for, or (e8m0) a scale's."""
    if kind in ("e4m3", "e5m2", "e8m0"):
        dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e8m0": torch.float8_e8m0fnu}[kind]
        return torch.arange(256, dtype=torch.uint8).view(dtype).float().to(device)
    values = {"nf4": NF4, "fp4": FP4, "mxfp4": E2M1, "q4_0": tuple(range(-8, 8)), "int4": (*range(8), *range(-8, 0))}[
        kind
    ]
    return torch.tensor(values, dtype=torch.float32, device=device)


def _codebook(kind: str, tensors: Sequence[Tensor], N: int, K: int) -> dict:
    codes, absmax, *nested = tensors
    out = dict(
        _PAIRS, UPPER=True, codes=codes, lookup=_table(kind, codes.device), scales=absmax, FLAT=True,
        GROUP=block_length(N * K, absmax.numel()),
    )  # fmt: skip
    if nested:
        book, outer, offset = nested
        out |= dict(book=book, outer=outer, offset=offset, OUTER=block_length(absmax.numel(), outer.numel()))
    return out


def _rows(codes: Tensor) -> tuple[Tensor, int]:
    codes = codes if codes.shape[1] <= 1 or codes.stride(1) == 1 else codes.contiguous()
    return codes, codes.stride(0) if codes.shape[0] > 1 else codes.shape[1]


def _int8(kind: str, tensors: Sequence[Tensor], N: int, K: int) -> dict:
    codes, row = _rows(tensors[0])
    return dict(_BYTES, codes=codes, row=row, scales=tensors[1], ROWS=1, groups=1)


def _fp8(kind: str, tensors: Sequence[Tensor], N: int, K: int) -> dict:
    codes, scale = tensors
    values = _table("e4m3" if codes.dtype == torch.float8_e4m3fn else "e5m2", codes.device)
    codes, row = _rows(codes.view(torch.uint8))
    out = dict(_BYTES, codes=codes, row=row, lookup=values, scales=scale, groups=1)
    if scale.dim() == 2:
        return out | dict(ROWS=128, GROUP=128, groups=scale.shape[1])
    return out | dict(ROWS=int(scale.numel() == N))


def _int4(kind: str, tensors: Sequence[Tensor], N: int, K: int) -> dict:
    codes, scale, zero = tensors
    groups = scale.shape[1]
    return dict(
        _PAIRS,
        codes=codes.contiguous().view(torch.uint8),
        lookup=_table(kind, codes.device) if codes.dtype == torch.int8 else None,
        scales=scale,
        zeros=zero.contiguous(),
        ROWS=1,
        groups=groups,
        GROUP=K // groups,
    )


def _halves4(kind: str, tensors: Sequence[Tensor], N: int, K: int) -> dict:
    # One run holds all of W.
    (codes, scale, zero), half = tensors, N * K // 2
    return dict(
        RUN=2 * half, RUN_BYTES=half, HALF=half, UPPER=kind == "hqq4", codes=codes, scales=scale, zeros=zero, FLAT=True,
        GROUP=2 * half // scale.numel(),
    )  # fmt: skip


def _mxfp4(kind: str, tensors: Sequence[Tensor], N: int, K: int) -> dict:
    blocks, scales = tensors
    device = blocks.device
    return dict(
        _PAIRS, codes=blocks, lookup=_table(kind, device), scales=scales, book=_table("e8m0", device), ROWS=1,
        groups=K // MX_BLOCK, GROUP=MX_BLOCK,
    )  # fmt: skip


def _gguf(kind: str, tensors: Sequence[Tensor], N: int, K: int) -> dict:
    raw = tensors[0].flatten()
    raw = raw.clone() if raw.storage_offset() % 2 else raw
    out = dict(scales=raw.view(torch.float16), RUN=GGUF_BLOCK, FLAT=True, GROUP=GGUF_BLOCK)
    if kind == "q4_0":
        return out | dict(codes=raw[2:], lookup=_table(kind, raw.device), HALF=16, RUN_BYTES=18, STEP=9)
    return out | dict(codes=raw[2:].view(torch.int8), HALF=32, RUN_BYTES=34, STEP=17)


_LAYOUTS: dict[str, Callable[[str, Sequence[Tensor], int, int], dict]] = {
    "nf4": _codebook, "fp4": _codebook, "int8": _int8, "int4": _int4, "hqq4": _halves4, "quanto4": _halves4, "fp8": _fp8,
    "mxfp4": _mxfp4, "q4_0": _gguf, "q8_0": _gguf,
}  # fmt: skip
QUANTISED = frozenset(_LAYOUTS)
KINDS = ("dense", "identity", *_LAYOUTS)


def weight_of(kind: str, tensors: Sequence[Tensor], N: int, K: int):
    """A base (N, K) as the kernels take it: a tensor, ``kernels.quantised.codes.Quantised``, or None for the identity."""
    if not tensors or kind == "dense":
        return tensors[0] if tensors else None
    return _quantised(N, K, **_LAYOUTS[kind](kind, tensors, N, K))


def _quantised(N: int, K: int, **given):
    import triton.language as tl

    from ...kernels.quantised.codes import Codes, Quantised

    default = dict(
        lookup=None, zeros=None, book=None, outer=None, offset=None, row=K, groups=0, UPPER=False, FLAT=False, GROUP=0, ROWS=0,
        STEP=1, OUTER=1,
    )  # fmt: skip
    of = default | given
    along, row, run = of["GROUP"] or _WIDEST, of["row"], of["RUN"]
    if of["FLAT"]:
        along = along | row
    whole = row % run == 0
    of |= dict(
        scales=of["scales"].contiguous(), WHOLE=whole, LONG=of["HALF"] % row == 0,
        pitch=row // run * of["RUN_BYTES"] if whole else 0, SPAN=min(along & -along, _WIDEST),
    )  # fmt: skip
    return Quantised(Codes(**{k: tl.constexpr(v) if k.isupper() else v for k, v in of.items()}), (N, K))

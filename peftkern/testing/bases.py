"""Random bases of every kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..bases.base import Base, kind_of


def _codes(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)


def _scales(g: torch.Generator, *shape: int) -> Tensor:
    """Scales of no common size, none near zero."""
    return (0.2 + torch.rand(shape, generator=g)) * 0.1


def _codebook(kind: str, N: int, K: int, g: torch.Generator, block: int, nested: bool) -> Base:
    n = N * K
    codes, absmax = _codes(g, (n + 1) // 2, 1), _scales(g, -(-n // block))
    if not nested:
        return Base(kind, (codes, absmax))
    code2 = torch.randn(256, generator=g).sort().values / 4
    absmax = _codes(g, -(-n // block))
    return Base(kind, (codes, absmax, code2, _scales(g, -(-absmax.numel() // 256)), torch.tensor(0.1)))


def _grouped(
    kind: str, N: int, K: int, g: torch.Generator, group: int, dtype: torch.dtype, signed: bool = False
) -> Base:
    G = K // group if K % group == 0 else 1
    groups = (N, G) if kind == "int4" else (N * G, 1)
    zero = torch.rand(groups, generator=g) * 15 - 8 * signed
    codes = _codes(g, N, K // 2) if kind == "int4" else _codes(g, N * K // 2, 1)
    codes = codes.view(torch.int8) if signed else codes
    return Base(kind, (codes, _scales(g, *groups).to(dtype), zero.to(dtype)))


def _int8(N: int, K: int, g: torch.Generator, dtype: torch.dtype) -> Base:
    return Base("int8", (_codes(g, N, K).view(torch.int8), (_scales(g, N) / 32).to(dtype)))


def _fp8(N: int, K: int, g: torch.Generator, codes: torch.dtype, scales: str) -> Base:
    shape = {"tensor": (1,), "row": (N,), "block": (-(-N // 128), -(-K // 128))}[scales]
    return Base("fp8", (torch.randn(N, K, generator=g).to(codes), _scales(g, *shape)))


def _mxfp4(N: int, K: int, g: torch.Generator) -> Base:
    scales = torch.randint(119, 127, (N, K // 32), generator=g, dtype=torch.uint8)
    return Base("mxfp4", (_codes(g, N, K // 32, 16), scales))


def _gguf(kind: str, N: int, K: int, g: torch.Generator, size: int) -> Base:
    blocks = N * K // 32
    d = (_scales(g, blocks) / (1 if size == 18 else 16)).half().view(torch.uint8).view(blocks, 2)
    return Base(kind, (torch.cat((d, _codes(g, blocks, size - 2)), dim=1).flatten(),))


# By name: what makes it of (N, K, generator), and what K must be a multiple of.
QUANTISED: dict[str, tuple[Callable[[int, int, torch.Generator], Base], int]] = {
    "nf4": (lambda N, K, g: _codebook("nf4", N, K, g, 64, False), 1),
    "nf4 nested": (lambda N, K, g: _codebook("nf4", N, K, g, 64, True), 1),
    "nf4 of blocks of 32": (lambda N, K, g: _codebook("nf4", N, K, g, 32, False), 1),
    "fp4": (lambda N, K, g: _codebook("fp4", N, K, g, 64, False), 1),
    "fp4 nested": (lambda N, K, g: _codebook("fp4", N, K, g, 128, True), 1),
    "int8": (lambda N, K, g: _int8(N, K, g, torch.float32), 1),
    "int8 bf16": (lambda N, K, g: _int8(N, K, g, torch.bfloat16), 1),
    "int4": (lambda N, K, g: _grouped("int4", N, K, g, 32, torch.float32), 2),
    "int4 bf16": (lambda N, K, g: _grouped("int4", N, K, g, 64, torch.bfloat16), 2),
    "int4 signed": (lambda N, K, g: _grouped("int4", N, K, g, 32, torch.float32, True), 2),
    "hqq4": (lambda N, K, g: _grouped("hqq4", N, K, g, 64, torch.float32), 2),
    "hqq4 fp16": (lambda N, K, g: _grouped("hqq4", N, K, g, 32, torch.float16), 2),
    "quanto4": (lambda N, K, g: _grouped("quanto4", N, K, g, 32, torch.float32), 2),
    "quanto4 fp16": (lambda N, K, g: _grouped("quanto4", N, K, g, 128, torch.float16), 2),
    "fp8": (lambda N, K, g: _fp8(N, K, g, torch.float8_e4m3fn, "tensor"), 1),
    "fp8 e5m2 by rows": (lambda N, K, g: _fp8(N, K, g, torch.float8_e5m2, "row"), 1),
    "fp8 by blocks": (lambda N, K, g: _fp8(N, K, g, torch.float8_e4m3fn, "block"), 1),
    "mxfp4": (lambda N, K, g: _mxfp4(N, K, g), 32),
    "q4_0": (lambda N, K, g: _gguf("q4_0", N, K, g, 18), 32),
    "q8_0": (lambda N, K, g: _gguf("q8_0", N, K, g, 34), 32),
}


def random_base(name: str, N: int, K: int, generator: torch.Generator) -> Base:
    """A base of one of ``QUANTISED`` with random codes and scales.

    K is a multiple of what its kind needs; N K even for hqq4 and quanto4.
    """
    return QUANTISED[name][0](N, K, generator)


def drawn(name: str, N: int, K: int, seed: int, device: torch.device | str = "cpu") -> Base:
    """The random base number ``seed``, the same on every device."""
    base = random_base(name, N, K, torch.Generator().manual_seed(seed))
    return Base(base.kind, tuple(t.to(device) for t in base.tensors))


def dequantised(base: Base, N: int, K: int) -> Tensor:
    """Its weight (N, K) in fp32, which is exact."""
    return kind_of(base.kind).dequantise(base.tensors, torch.float32, (N, K))

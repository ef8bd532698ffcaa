"""Kinds of quantised weights: each definition, element by element."""

from __future__ import annotations

import struct

import pytest
import torch

from peftkern.bases.base import kind_of
from peftkern.bases.packed import block_length
from peftkern.testing.bases import QUANTISED, random_base

F32 = torch.float32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def dequantised(base, N, K, dtype=F32):
    return kind_of(base.kind).dequantise(base.tensors, dtype, (N, K))


# NF4's and FP4's values, rounded, in another order than codes are looked up in.
NF4 = [
    -1,
    -0.6962,
    -0.5251,
    -0.3949,
    -0.2844,
    -0.1848,
    -0.0911,
    0,
    0.0796,
    0.1609,
    0.2461,
    0.3379,
    0.4407,
    0.5626,
    0.7230,
    1,
]
FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
MXFP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def high(byte):
    return byte >> 4


def low(byte):
    return byte & 15


def signed(values, q):
    return -values[q - 8] if q > 7 else values[q]


def block_of(n, blocks):
    return next(b for b in (2**i for i in range(40)) if -(-n // b) == blocks)


def codebook(value):
    def element(parts, N, K, n, k):
        i = n * K + k
        codes, absmax, *nested = (t.flatten().tolist() for t in parts)
        b = i // block_of(N * K, len(absmax))
        scale = absmax[b]
        if nested:
            code2, absmax2, (offset,) = nested
            scale = code2[absmax[b]] * absmax2[b // 256] + offset
        return value((low if i % 2 else high)(codes[i // 2])) * scale

    return element


def int4(parts, N, K, n, k):
    codes, scale, zero = (t.tolist() for t in parts)
    group = k // (K // len(scale[0]))
    q = (high if k % 2 else low)(codes[n][k // 2] % 256)
    q -= 16 * (parts[0].dtype == torch.int8 and q > 7)
    return (q - zero[n][group]) * scale[n][group]


def halves(first, second):
    def element(parts, N, K, n, k):
        codes, scale, zero = (t.flatten().tolist() for t in parts)
        i, half = n * K + k, N * K // 2
        group = i // (N * K // len(scale))
        return ((first(codes[i]) if i < half else second(codes[i - half])) - zero[group]) * scale[group]

    return element


def fp8(parts, N, K, n, k):
    codes, scale = (t.float().tolist() for t in parts)
    if isinstance(scale[0], list):
        return codes[n][k] * scale[n // 128][k // 128]
    return codes[n][k] * (scale[0] if len(scale) == 1 else scale[n])


def mxfp4(parts, N, K, n, k):
    blocks, scales = (t.tolist() for t in parts)
    byte = blocks[n][k // 32][k % 32 // 2]
    return signed(MXFP4, (high if k % 2 else low)(byte)) * 2.0 ** (scales[n][k // 32] - 127)


def gguf(size, value):
    def element(parts, N, K, n, k):
        at = (n * K + k) // 32 * size
        block = bytes(parts[0].flatten()[at : at + size].tolist())
        return value(block[2:], k % 32) * struct.unpack("<e", block[:2])[0]

    return element


ELEMENTS = {
    "nf4": codebook(lambda q: NF4[q]),
    "fp4": codebook(lambda q: signed(FP4, q)),
    "int8": lambda parts, N, K, n, k: parts[0][n, k].item() * parts[1][n].item(),
    "int4": int4,
    "hqq4": halves(high, low),
    "quanto4": halves(low, high),
    "fp8": fp8,
    "mxfp4": mxfp4,
    "q4_0": gguf(18, lambda codes, i: (codes[i] & 15 if i < 16 else codes[i - 16] >> 4) - 8),
    "q8_0": gguf(34, lambda codes, i: struct.unpack("32b", codes)[i]),
}


def sizes(name):
    """A size with one block, one whose blocks straddle rows where the kind has them, and one of several tiles of 128."""
    step = QUANTISED[name][1]
    return {1: ((1, 7), (7, 45), (139, 161)), 2: ((1, 6), (6, 96), (5, 34)), 32: ((1, 32), (5, 96))}[step]


@pytest.mark.parametrize("name", QUANTISED)
def test_each_element(name):
    g = generator()
    for N, K in sizes(name):
        base = random_base(name, N, K, g)
        W = dequantised(base, N, K)
        assert W.shape == (N, K) and W.dtype == F32
        places = [divmod(i, K) for i in torch.randperm(N * K, generator=g)[:60].tolist()] + [(N - 1, K - 1)]
        expected = torch.tensor([ELEMENTS[base.kind](base.tensors, N, K, *at) for at in places])
        found = torch.stack([W[at] for at in places])
        # The codebooks above have four digits.
        close = dict(rtol=1e-3, atol=1e-5) if base.kind == "nf4" else dict(rtol=3e-7, atol=1e-7)
        torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("name", QUANTISED)
def test_what_a_kind_says(name):
    N, K = sizes(name)[1]
    base, x = random_base(name, N, K, generator()), torch.randn(2, K)
    kind = kind_of(base.kind)
    assert kind.check(base.tensors, x, K, N) == kind.check(base.tensors, x.bfloat16(), K, N) == (N, K)
    assert kind.check(base.tensors, x, None if kind.sized else K, None) == (N, K)
    assert all(a is b for a, b in zip(kind.cast(base.tensors, torch.bfloat16), base.tensors, strict=True))
    W = dequantised(base, N, K)
    assert torch.equal(dequantised(base, N, K, torch.bfloat16), W.bfloat16())
    assert torch.equal(dequantised(base, N, K, torch.float64), W.double())


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("empty", ["N", "K"])
def test_empty(name, empty):
    N, K = (0, 64) if empty == "N" else (4, 0)
    base = random_base(name, N, K, generator())
    assert kind_of(base.kind).check(base.tensors, torch.randn(2, K), K, N) == (N, K)
    assert dequantised(base, N, K).shape == (N, K)


def test_block_length():
    for n in (1, 2, 63, 64, 65, 5000, 4096 * 11):
        for b in (1, 2, 64, 256, 4096):
            blocks = -(-n // b)
            assert -(-n // block_length(n, blocks)) == blocks and (blocks == 1 or block_length(n, blocks) == b)
    assert block_length(100, 6) == 0 and block_length(100, 0) == 0 and block_length(100, 101) == 0

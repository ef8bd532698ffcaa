"""Layouts of quantised weights: what a kind refuses, and how it says so."""

from __future__ import annotations

import re

import pytest
import torch

from peftkern import lora_linear
from peftkern.bases.base import Base, kind_of
from peftkern.testing.bases import random_base


def made(name, N=6, K=96):
    return random_base(name, N, K, torch.Generator().manual_seed(0))


def broken(name, at, change):
    """A base of that name on a weight of 6 x 96, one of its tensors changed."""
    kind, tensors, _ = made(name)
    return Base(kind, (*tensors[:at], change(tensors[at]), *tensors[at + 1 :]))


def short(t):
    return t.flatten()[:-1].contiguous()


def gaps(t):
    return torch.stack((t, t), dim=-1)[..., 0]


def first(n):
    return lambda t: t[:n]


def zeros(*shape):
    return lambda t: t.new_zeros(shape)


def viewed(dtype):
    return lambda t: t.view(dtype)


BYTES, TENSORS = (
    "expected ceil(N K / 2) for N = 6 and K = 96 = 288",
    "expected 2 (codes, absmax) or 5 (codes, absmax, code2",
)
REFUSED = {
    "nf4 of int8": ("nf4", 0, viewed(torch.int8), "nf4 codes has dtype int8, expected uint8"),
    "nf4 of too few bytes": ("nf4", 0, short, f"nf4 codes has 287 elements, {BYTES}"),
    "nf4 with gaps": ("nf4", 0, gaps, "nf4 codes has strides (2, 2), expected contiguous"),
    "nf4 of other blocks": ("nf4", 1, first(7), "nf4 absmax has 7 blocks, expected ceil(576 / b) of a power of two b"),
    "nf4 with half scales": ("nf4", 1, torch.Tensor.half, "nf4 absmax has dtype float16, expected float32"),
    "nf4 on two devices": ("nf4", 1, lambda t: t.to("meta"), "nf4 absmax is on meta, expected cpu"),
    "no tensor": ("nf4", 1, lambda t: None, "nf4[1] must be a tensor, got NoneType"),
    "nested, codebook": ("nf4 nested", 2, first(100), "nf4 code2 has shape (100,), expected (256,) = (256,)"),
    "nested, blocks": ("nf4 nested", 3, zeros(7), "nf4 absmax2 has 7 blocks, expected ceil(9 / b)"),
    "nested, offset": ("fp4 nested", 4, zeros(2), "fp4 offset has 2 elements, expected one = 1"),
    "int8 by columns": ("int8", 1, zeros(96), "int8 scale has shape (96,), expected (N,) = (6,)"),
    "int8 of another size": ("int8", 0, lambda t: t[:, :95], "x has shape (2, 96), expected (M, K) with K = 95"),
    "int8 in 3-D": ("int8", 0, lambda t: t[None], "int8 codes has shape (1, 6, 96), expected (N, K)"),
    "int4, groups": (
        "int4",
        1,
        zeros(6, 5),
        "int4 scale has shape (6, 5), expected (N, G) with N = 6 and G a divisor of K = 96",
    ),
    "int4, zeros": ("int4", 2, lambda t: t[:, :1], "int4 zero has shape (6, 1), expected (N, G) = (6, 3)"),
    "hqq4 of too few bytes": (
        "hqq4",
        0,
        short,
        "hqq4 codes has 287 elements, expected N K / 2 for N = 6 and K = 96 = 288",
    ),
    "hqq4, groups": ("hqq4 fp16", 1, first(7), "hqq4 scale has 7 elements, expected a divisor of N K = 576"),
    "hqq4, zeros": ("hqq4 fp16", 2, first(6), "hqq4 zero has 6 elements, expected that of scale = 18"),
    "quanto4 of int8": ("quanto4", 0, viewed(torch.int8), "quanto4 codes has dtype int8, expected uint8"),
    "quanto4, groups": ("quanto4", 1, first(7), "quanto4 scale has 7 elements, expected a divisor of N K = 576"),
    "fp8 as bytes": ("fp8", 0, viewed(torch.uint8), "fp8 codes has dtype uint8, expected float8_e4m3fn, float8_e5m2"),
    "fp8 of other blocks": (
        "fp8",
        1,
        zeros(6, 1),
        "fp8 scale has shape (6, 1), expected (1,), (N,) = (6,) or (ceil(N / 128)",
    ),
    "mxfp4, flat": ("mxfp4", 0, lambda t: t.flatten(1), "mxfp4 blocks has shape (6, 48), expected (N, K / 32, 16)"),
    "mxfp4, scales": ("mxfp4", 1, zeros(6, 2), "mxfp4 scales has shape (6, 2), expected (N, K / 32) = (6, 3)"),
    "q4_0 of half a block": (
        "q4_0",
        0,
        short,
        "q4_0 raw has 323 elements, expected 18 N K / 32 for N = 6 and K = 96 = 324",
    ),
    "q8_0 as int8": ("q8_0", 0, viewed(torch.int8), "q8_0 raw has dtype int8, expected uint8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    name, at, change, words = REFUSED[case]
    error = TypeError if "dtype" in words or "must be" in words else ValueError
    with pytest.raises(error, match=re.escape(words)):
        lora_linear(
            torch.randn(2, 96, requires_grad=True), broken(name, at, change), torch.randn(3, 96), torch.randn(6, 3)
        )


def test_another_number_of_tensors():
    kind, tensors, _ = made("nf4")
    with pytest.raises(ValueError, match=re.escape(f"base has 1 tensors, {TENSORS}")):
        lora_linear(torch.randn(2, 96), Base(kind, tensors[:1]), torch.randn(3, 96), torch.randn(6, 3))


@pytest.mark.parametrize("name, K", [("int4", 7), ("mxfp4", 40), ("q4_0", 40), ("hqq4", 7), ("quanto4", 7)])
def test_sizes_that_a_kind_has_not(name, K):
    kind, tensors, _ = made(name)
    with pytest.raises(ValueError, match=rf"in_features that 32 divides, got K = {K}|an even number of .*K = {K}"):
        kind_of(kind).check(tensors, torch.randn(2, K), K, 3)


@pytest.mark.parametrize("name", ["nf4", "hqq4", "q8_0"])
def test_nothing_tells_in_features(name):
    kind, tensors, _ = made(name)
    with pytest.raises(ValueError, match=f"a base of kind {kind} has no in_features of its own"):
        kind_of(kind).check(tensors, torch.randn(2, 96), None, None)

"""``quantize`` without a library: how near the weight is, how much it holds, what it refuses."""

from __future__ import annotations

import pytest
import torch

import peftkern
from peftkern import quantize
from peftkern.bases.base import kind_of

# The largest relative error of a normal weight, and bytes for each element.
KINDS = {
    "nf4": ({}, 0.095, 0.5625),
    "nf4 nested": (dict(nested=True), 0.096, 0.55),
    "fp4": (dict(block_size=128), 0.15, 0.532),
    "int8": ({}, 0.01, 1.02),
    "int4": ({}, 0.1, 0.5625),
    "int4 of 32": (dict(block_size=32), 0.09, 0.625),
    "fp8": ({}, 0.03, 1.02),
    "fp8 by blocks": (dict(block_size=128), 0.03, 1.001),
    "mxfp4": ({}, 0.125, 0.532),
}


def made(name, W):
    return quantize(W, name.split()[0], **KINDS[name][0])


def back(base):
    return kind_of(base.kind).dequantise(base.tensors, torch.float32, base.shape)


@pytest.mark.parametrize("name", KINDS)
def test_near_and_small(name):
    W = torch.randn(130, 256, generator=torch.Generator().manual_seed(0))
    base, (_, error, size) = made(name, W), KINDS[name]
    assert kind_of(base.kind).check(base.tensors, W, 256, 130) == base.shape == (130, 256)
    assert (back(base) - W).norm() <= error * W.norm()
    assert sum(t.nbytes for t in base.tensors) <= size * W.numel() + 1100  # the codebook of nested scales


@pytest.mark.parametrize("name", KINDS)
def test_zeros_and_nothing(name):
    assert not back(made(name, torch.zeros(4, 256))).any()
    for shape in ((0, 256), (4, 0)):
        assert back(made(name, torch.zeros(shape))).shape == shape


# A group in int4 whose end codes are not used has another step the second time.
@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("int4")])
def test_what_is_quantised_once_stays(name):
    """Values that have codes keep them, to the rounding of the scales."""
    W = back(made(name, torch.randn(128, 256)))
    torch.testing.assert_close(back(made(name, W)), W, rtol=0.02, atol=2e-2 * W.abs().max().item())


def test_a_parameter_is_not_kept():
    W = torch.nn.Parameter(torch.randn(4, 64))
    assert not any(t.requires_grad for t in quantize(W, "int8").tensors)


REFUSED = {
    "1-D": (lambda: quantize(torch.randn(64), "nf4"), ValueError, r"weight has shape \(64,\), expected \(N, K\)"),
    "a list": (lambda: quantize([1.0], "nf4"), TypeError, "weight must be a tensor, got list"),
    "another kind": (lambda: quantize(torch.randn(4, 64), "q4_0"), ValueError, "kind is 'q4_0', expected one of nf4, fp4, int8"),
    "blocks": (lambda: quantize(torch.randn(4, 64), "nf4", block_size=48), ValueError, "nf4 has no block_size 48 .*power of two"),
    "rows": (lambda: quantize(torch.randn(4, 64), "int8", block_size=64), ValueError, "int8 has no block_size 64"),
    "groups": (lambda: quantize(torch.randn(4, 96), "int4"), ValueError, "int4 has no block_size 64 .*an even divisor"),
    "mxfp4": (lambda: quantize(torch.randn(4, 40), "mxfp4"), ValueError, "mxfp4 has no block_size 32 .*divides in_features"),
    "a float": (lambda: quantize(torch.randn(4, 64), "nf4", block_size=64.0), TypeError, "block_size must be an int, got float"),
    "a word": (lambda: quantize(torch.randn(4, 64), "int4", block_size="64"), TypeError, "block_size must be an int, got str"),
    "nested": (lambda: quantize(torch.randn(4, 64), "int8", nested=True), ValueError, "nested is for the scales of nf4 and fp4"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        call()


def test_public():
    assert peftkern.quantize is quantize and "quantize" in peftkern.__all__


def test_compute():
    W = torch.randn(8, 64)
    base, plain = quantize(W, "int8", compute="int8"), quantize(W, "int8")
    assert base.kind == "w8a8" and all(map(torch.equal, base.tensors, plain.tensors))
    assert torch.equal(back(base), back(plain))
    for kind, compute, says in (("nf4", "int8", "this one is nf4"), ("int8", "int4", "compute is 'int4'")):
        with pytest.raises(ValueError, match=says):
            quantize(W, kind, compute=compute)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_not_finite_stays_so(name, bad):
    W = torch.randn(130, 512)
    W[1, 70] = bad
    base = made(name, W)
    assert not back(base)[1, 70].isfinite()
    A, B = torch.zeros(2, 512), torch.zeros(130, 2)
    for rows in (1, 40):
        assert not peftkern.lora_linear(torch.ones(rows, 512), base, A, B)[:, 1].isfinite().any()
    if "nested" not in name:  # whose scales share one offset
        assert back(base)[128:].isfinite().all()

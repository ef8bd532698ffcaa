"""Bases: what a kind says of its tensors, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from peftkern import lora_linear
from peftkern.autograd.lora_linear import lora_linear_with
from peftkern.bases.base import IDENTITY, KINDS, Base, base_of, kind_of

X = torch.randn(3, 5)
W = torch.randn(4, 5)


def test_what_stands_where_a_weight_does():
    assert base_of(W) == ("dense", (W,), None) and base_of(IDENTITY) is IDENTITY
    for bad in (None, [W], W.numpy()):
        with pytest.raises(TypeError, match="weight must be a tensor"):
            base_of(bad)
    assert all(kind_of(name).name == name for name in KINDS)
    with pytest.raises(ValueError, match="kind is 'sparse', expected one of dense, identity, nf4"):
        kind_of("sparse")


@pytest.mark.parametrize("known", [(None, None), (5, None), (None, 4), (5, 4)])
def test_dense_sizes(known):
    assert kind_of("dense").check([W], X, *known) == (4, 5)


DENSE = {
    "no tensor": ([], {}, ValueError, "base has 0 tensors"),
    "two tensors": ([W, W], {}, ValueError, "base has 2 tensors"),
    "1-D": ([W[0]], {}, ValueError, r"weight has shape \(5,\), expected \(N, K\)"),
    "other K": ([W], dict(K=6), ValueError, r"weight has shape \(4, 5\), expected \(N, K\) = \(4, 6\)"),
    "other N": ([W], dict(N=3), ValueError, r"weight has shape \(4, 5\), expected \(N, K\) = \(3, 5\)"),
    "other dtype": ([W.half()], {}, TypeError, "weight has dtype float16, expected float32"),
    "sparse": ([W.to_sparse()], {}, TypeError, "weight must be a dense strided tensor"),
    "elsewhere": ([W.to("meta")], {}, ValueError, "weight is on meta, expected cpu"),
    "a list": ([[1.0]], {}, TypeError, "weight must be a tensor"),
}


@pytest.mark.parametrize("case", DENSE)
def test_dense_refuses(case):
    tensors, known, error, words = DENSE[case]
    with pytest.raises(error, match=words):
        kind_of("dense").check(tensors, X, known.get("K"), known.get("N"))


def test_identity_sizes():
    identity = kind_of("identity")
    assert identity.check([], X, 5, None) == identity.check([], X, None, 5) == identity.check([], X, 5, 5) == (5, 5)
    with pytest.raises(ValueError, match="base has 1 tensors, expected none"):
        identity.check([W], X, 5, 5)
    with pytest.raises(ValueError, match="as many out_features as in_features, got N = 4 and K = 5"):
        identity.check([], X, 5, 4)


def test_cast_and_dequantise():
    dense, identity = kind_of("dense"), kind_of("identity")
    assert dense.cast([W], W.dtype)[0] is W and dense.cast([W], torch.bfloat16)[0].dtype == torch.bfloat16
    assert torch.equal(dense.dequantise([W.half()], torch.float32, (4, 5)), W.half().float())
    assert identity.cast([], torch.bfloat16) == [] and identity.dequantise([], torch.float32, (5, 5)) is None


def test_an_identity_that_does_not_fit():
    A, B = torch.randn(2, 5), torch.randn(5, 2)
    with pytest.raises(ValueError, match="as many out_features as in_features, got N = 4 and K = 5"):
        lora_linear(X, IDENTITY, A, B[:4])
    with pytest.raises(ValueError, match="lora_A has shape"):
        lora_linear(X, IDENTITY, A[:, :4], B)
    with pytest.raises(ValueError, match="lora_B has shape"):
        lora_linear(X, IDENTITY, A, B[0])
    with pytest.raises(ValueError, match="base has 1 tensors"):
        lora_linear_with(X, Base("identity", (W,)), A, B)
    with pytest.raises(ValueError, match="kind is 'nf9'"):
        lora_linear_with(X, Base("nf9", ()), A, B)

"""Dropout that keeps its seed: the bits of dropout_mask, and derivatives of any order."""

from __future__ import annotations

import pytest
import torch

import peftkern
from peftkern.autograd.dropout_mask import zeroed

M, K, P = 6, 9, 0.4
SEED = torch.tensor([3])


def _kept():
    return peftkern.dropout_mask(M, K, P, 3)


@pytest.mark.parametrize("shape", [(M, K), (2, 3, K)])
def test_zeroed(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.equal(zeroed(x, P, SEED).view(M, K), torch.where(_kept(), x.view(M, K), 0.0))
    assert torch.autograd.gradcheck(lambda x: zeroed(x, P, SEED), x)
    assert torch.autograd.gradgradcheck(lambda x: zeroed(x, P, SEED).pow(3), x)


def test_what_is_dropped_may_be_anything():
    x = torch.where(_kept(), 1.0, float("nan"))
    assert torch.equal(zeroed(x, P, SEED), _kept().float())
    assert zeroed(torch.empty(0, K), P, SEED).shape == (0, K)


def test_only_the_seed_is_saved():
    saved, x = [], torch.randn(M, K, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        zeroed(x, P, SEED)
    assert [t.data_ptr() for t in saved] == [SEED.data_ptr()]

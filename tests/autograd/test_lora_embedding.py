"""lora_embedding against its equation: forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from peftkern.autograd.lora_embedding import lora_embedding

V, N = 11, 6


def _case(ranks=(3,), dtype=torch.float64):
    pairs = [torch.randn(shape, dtype=dtype).requires_grad_() for r in ranks for shape in ((r, V), (N, r))]
    return torch.randint(0, V, (4, 5)), torch.randn(V, N, dtype=dtype), pairs


def _equation(ids, E, *pairs, scale=1.0, padding=None):
    y = F.embedding(ids, E) * scale
    for A, B in zip(pairs[::2], pairs[1::2]):
        y = y + F.embedding(ids, A.t(), padding_idx=padding) @ B.t()
    return y


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("options", [{}, {"padding": 3}, {"scale": 2.5}, {"scale": torch.tensor(2.5)}], ids=str)
@pytest.mark.parametrize("ranks", [(3,), (2, 4)])
def test_equation_and_gradients(ranks, options, ids_dtype):
    ids, E, pairs = _case(ranks)
    ids[0, :2] = 3
    y, expected = lora_embedding(ids.to(ids_dtype), E, *pairs, **options), _equation(ids, E, *pairs, **options)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    for got, want in zip(*(torch.autograd.grad(t, pairs, dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    ids, E, pairs = _case((3, 2))
    assert torch.autograd.gradcheck(lambda *pairs: lora_embedding(ids, E, *pairs), pairs)


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_of_them_trains(frozen):
    ids, E, pairs = _case()
    pairs[frozen].requires_grad_(False)
    dy = torch.randn(4, 5, N, dtype=torch.float64)
    (got,) = torch.autograd.grad(lora_embedding(ids, E, *pairs), pairs[1 - frozen], dy)
    (want,) = torch.autograd.grad(_equation(ids, E, *pairs), pairs[1 - frozen], dy)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_lora_A_is_laid_out_as_lora_A():
    # So that what accumulates gradients takes it as it is.
    ids, E, pairs = _case()
    dA, dB = torch.autograd.grad(lora_embedding(ids, E, *pairs).sum(), pairs)
    assert dA.is_contiguous() and dB.is_contiguous()


def test_the_table_stays_as_it_is():
    ids, E, pairs = _case()
    before = E.clone()
    lora_embedding(ids, E, *pairs, scale=3.0)
    assert torch.equal(E, before)


def test_what_is_saved():
    ids, E, pairs = _case()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_embedding(ids, E, *pairs)
    assert sorted(t.numel() for t in kept if t is not pairs[1]) == sorted([ids.numel(), 3 * ids.numel()])


def test_an_id_out_of_range():
    ids, E, pairs = _case()
    with pytest.raises(IndexError):
        lora_embedding(torch.tensor([V]), E, *pairs)

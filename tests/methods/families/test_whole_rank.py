"""Branches of so many ranks that they are products of whole matrices, as RandLoRA's is."""

from __future__ import annotations

import pytest
import torch

import peftkern
from peftkern.autograd.weight import folded_linear
from peftkern.methods import METHODS, linear

pytest.importorskip("peft", reason="HF PEFT is not installed")

METHODS_WITH_BRANCHES = ["RandLoRA", "LoRA", "VeRA", "DeLoRA", "LoHa"]


@pytest.fixture
def calls(monkeypatch):
    """Makes every branch whole, however small, and its products' nodes ours. A list that grows with each product."""
    made, product = [], linear.folded_linear

    def counted(*args):
        made.append(args)
        return product(*args)

    monkeypatch.setattr(linear, "WHOLE", 1)
    monkeypatch.setattr(folded_linear, "SMALL", 0)
    monkeypatch.setattr(linear, "folded_linear", counted)
    return made


@pytest.mark.parametrize("name", METHODS_WITH_BRANCHES)
def test_parity(parity, calls, name):
    parity(METHODS[name])
    assert calls


@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", METHODS_WITH_BRANCHES)
def test_half_precision(half_parity, calls, name, dtype, autocast):
    half_parity(METHODS[name], dtype, autocast)
    assert calls


@pytest.mark.parametrize("K, N", [(520, 640), (640, 520)])
def test_from_its_rank_on(K, N):
    # 520 ranks, in half precision with factors in fp32: near the equation in fp64, and all but x is kept once.
    W, x = torch.randn(N, K).bfloat16() / 32, torch.randn(9, K).bfloat16().requires_grad_()
    A, B = torch.randn(8, 1, 520), torch.randn(640, 65, 8)
    strength, gamma = torch.randn(8, 65).requires_grad_(), torch.randn(65, 520).requires_grad_()
    y = peftkern.randlora_linear(x, W, A, B, strength, gamma, scaling=1 / 512)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, W, A, B, strength, gamma)]
    small = (exact[4][..., None] * exact[2] * exact[5]).flatten(0, 1)
    change = exact[3].flatten(1) @ small / 512
    want = torch.nn.functional.linear(exact[0], exact[1] + (change if K < N else change.t()))
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, strength, gamma), dy)
    expected = torch.autograd.grad(want, (exact[0], *exact[4:]), dy.double())
    for a, b, eps in zip((y, *got), (want, *expected), (2**-8, 2**-8, 2**-19, 2**-19), strict=True):
        assert (a.double() - b).norm() <= eps * b.norm()


def test_few_ranks_stay_with_the_base(calls, monkeypatch):
    monkeypatch.setattr(linear, "WHOLE", 512)
    x, W = torch.randn(3, 8), torch.randn(8, 8)
    for ranks, products in ((511, 0), (512, 2)):
        A, B = torch.randn(ranks, 8), torch.randn(8, ranks)
        y = linear.run(linear.Linear(W).add(linear.Branch(A, B)), x)
        torch.testing.assert_close(y, x @ (W + B @ A).t(), rtol=1e-4, atol=1e-3)
        assert len(calls) == products

"""LoHa's own ways: what it drops, and where its branch would cost more than the library's own code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peftkern
from peftkern.methods import tuner

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")

K, N = 24, 20


def _pair(**options):
    config = peft.LoHaConfig(target_modules=["0"], r=3, init_weights=False, **options)
    stock = tuner.layer(nn.Linear(K, N), config).train()
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    return ours, stock


def _gradients(model, x, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad), torch.rand(3)]


@pytest.mark.parametrize(
    "drops", [{}, {"rank_dropout": 0.4}, {"module_dropout": 0.5}, {"rank_dropout": 0.4, "module_dropout": 0.5}], ids=str
)
def test_drops_what_the_library_drops(drops):
    # By the same draws, which are as many: what follows them is the same too. A layer that is left out has no gradient.
    ours, stock = _pair(**drops)
    x, none = torch.randn(5, K).requires_grad_(), 0
    for seed in range(8):
        got, want = (_gradients(model, x, seed) for model in (ours, stock))
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        none += want[1] is None
    assert (0 < none < 8) == ("module_dropout" in drops)
    assert peftkern.status(ours).fused == 8
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x))


def test_a_rank_that_costs_too_much_runs_the_librarys_code():
    stock = tuner.layer(nn.Linear(K, N), peft.LoHaConfig(target_modules=["0"], r=4, init_weights=False))
    ours, x = copy.deepcopy(stock), torch.randn(5, K)
    report = peftkern.accelerate(ours)
    assert "rank 16, too much for a weight of 20 x 24" in str(report)
    assert torch.equal(ours(x), stock(x)) and peftkern.status(ours).fused == 0

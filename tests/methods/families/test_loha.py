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


def _pair(r=2, **options):
    config = peft.LoHaConfig(target_modules=["0"], r=r, init_weights=False, **options)
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


@pytest.mark.parametrize("drops", [{}, {"rank_dropout": 0.4}, {"module_dropout": 0.5}], ids=str)
def test_a_high_rank_changes_the_weight(drops):
    ours, stock = _pair(r=5, **drops)
    x = torch.randn(5, K).requires_grad_()
    for seed in range(4):
        for a, b in zip(*(_gradients(model, x, seed) for model in (ours, stock)), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert peftkern.status(ours).fused == 4


def test_what_a_high_rank_keeps():
    # x, and one matrix of the weight's size: the changed weight.
    ours, _ = _pair(r=7)
    x, seen = torch.randn(2, K).requires_grad_(), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t):
        ours(x)
    own = {p.data_ptr() for p in ours.parameters()} | {x.data_ptr()}
    assert sum(t.numel() for address, t in seen.items() if address not in own) <= K * N


def test_a_high_rank_in_half_precision_runs_the_librarys_code():
    config = peft.LoHaConfig(target_modules=["0"], r=4, init_weights=False)
    stock = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config, autocast_adapter_dtype=False).bfloat16()
    ours, x = copy.deepcopy(stock), torch.randn(5, K).bfloat16()
    assert "in half precision" in str(peftkern.accelerate(ours))
    assert torch.equal(ours(x), stock(x)) and peftkern.status(ours).fused == 0

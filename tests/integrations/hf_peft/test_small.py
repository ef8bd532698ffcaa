"""Calls that are too small to gain run PEFT's own code, on the kept path and on the careful one, and say so without a warning."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import peftkern
from peftkern import settings
from peftkern.dispatch.least import WEIGHT
from peftkern.methods import METHODS, tuner

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")

K, N = 24, 20
WORTH = 10_000  # products


@pytest.fixture(autouse=True)
def declined(small_calls):
    limits = dict.fromkeys((name for name, m in METHODS.items() if m.loses_small), WORTH) | {WEIGHT: 2 * K * N}
    with settings.using(small_calls=False, least=tuple(limits.items())):
        yield


def _pair():
    stock = tuner.layer(
        nn.Linear(K, N), peft.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False)
    )
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    return ours, stock


def _counts(model):
    status = peftkern.status(model, reset=True)
    return status.fused, status.stock


ENOUGH = -(-WORTH // (K * N))  # rows


def test_each_call_is_asked():
    ours, stock = _pair()
    few, many = torch.randn(ENOUGH - 1, K), torch.randn(ENOUGH, K)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ours(few), stock(few))  # the first call of a layer
        (reason,) = peftkern.status(ours).reasons.values()
        assert reason == "too small to gain: the library's own code is faster" and _counts(ours) == (0, 1)
        for _ in range(2):
            ours(many)
            ours(few)
        ours(many.view(2, -1, K)) if ENOUGH % 2 == 0 else ours(many[None])
    assert _counts(ours) == (3, 2)


def test_what_the_layer_has_become_meanwhile():
    ours, stock = _pair()
    x = torch.randn(5, K)
    ours(x)
    for model in (ours, stock):
        model.base_model.model[0].merge()
    assert torch.equal(ours(x), stock(x))
    for model in (ours, stock):
        model.base_model.model[0].unmerge()
        model.base_model.model[0].ia3_l["default"].data.fill_(3.0)
    assert torch.equal(ours(x), stock(x)) and _counts(ours) == (0, 3)
    peftkern.restore(ours)
    assert torch.equal(ours(x), stock(x)) and _counts(ours) == (0, 0)


def test_settings_that_take_them():
    ours, _ = _pair()
    x = torch.randn(5, K)
    ours(x)
    with settings.using(small_calls=True):
        ours(x)
    with settings.using(batch_invariant=True):  # bits may not depend on the number of rows
        ours(x)
    assert _counts(ours) == (2, 1)


def test_methods_without_a_bound_take_all():
    model = tuner.layer(nn.Linear(K, N), peft.LoraConfig(target_modules=["0"]))
    peftkern.accelerate(model)
    for _ in range(3):
        model(torch.randn(1, K))
    assert not METHODS["LoRA"].loses_small and _counts(model) == (3, 0)


def test_a_plan_that_is_not_kept():
    stock = METHODS["PEANuT"].build(nn.Linear(K, N).requires_grad_(False), 4)
    ours, x = copy.deepcopy(stock), torch.randn(5, K)
    peftkern.accelerate(ours)
    for _ in range(3):
        assert torch.equal(ours(x), stock(x))
    assert _counts(ours) == (0, 3)


def test_calls_with_arguments():
    model = METHODS["aLoRA"].build(nn.Linear(K, N).requires_grad_(False), 4)
    ours, x = copy.deepcopy(model), torch.randn(3, 6, K)
    peftkern.accelerate(ours)
    for _ in range(2):
        assert torch.equal(ours(x), model(x))
    assert _counts(ours) == (0, 2)
    with settings.using(small_calls=True):
        ours(x)
    assert _counts(ours) == (1, 0)


def test_a_batch_with_names_is_taken():
    ours, _ = _pair()
    x, layer = torch.randn(2, 3, K), ours.eval().base_model.model[0]
    ours(x)
    layer(x, adapter_names=["default", "__base__"])
    assert _counts(ours) == (1, 1)

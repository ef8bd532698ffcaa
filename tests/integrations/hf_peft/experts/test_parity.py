"""Adapted experts against PEFT's own code: every kind of module and implementation, outputs and all gradients."""

from __future__ import annotations

import copy

import pytest
import torch

import peftkern

KINDS = ("gate", "transposed, bias, interleaved", "transposed", "no gate", "norm")
HALF = (torch.bfloat16, torch.float16)


def _same(moe, stock, dtype=torch.float64, **tolerance):
    ours = copy.deepcopy(stock)
    assert list(peftkern.accelerate(ours).accelerated) == ["base_model.model.experts"]
    given = moe.call(dtype=dtype)
    grad = torch.randn(len(given[0]), moe.columns, dtype=dtype)
    got, wanted = (moe.step(model, *given, grad) for model in (ours, stock))
    assert got.keys() == wanted.keys()
    torch.testing.assert_close(got, wanted, **tolerance)
    status = peftkern.status(ours)
    assert (status.fused, status.stock) == (1, 0)
    return got


@pytest.mark.parametrize("implementation", [None, "eager", "batched_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_fp64(moe, kind, implementation):
    got = _same(moe, moe.both(kind, implementation, torch.float64))
    assert sum("lora_" in name for name in got) == 4 and all(t.abs().max() > 0 for t in got.values())


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_mm(moe, kind):
    _same(moe, moe.both(kind, "grouped_mm"), torch.float32, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("kind", ["gate", "transposed, bias, interleaved"])
def test_one_projection(moe, kind, target):
    got = _same(moe, moe.adapted(moe.block(kind).double(), target))
    assert sum("lora_" in name for name in got) == 2


def test_frozen_matrices(moe):
    stock = moe.both(dtype=torch.float64)
    for name, p in stock.named_parameters():
        p.requires_grad_("lora_B" in name)
    assert sum("lora_" in name for name in _same(moe, stock)) == 2


def test_several_adapters(moe):
    stock = moe.both(dtype=torch.float64)
    stock.add_adapter("other", type(stock.peft_config["default"])(**{**_options(stock), "r": 2, "use_rslora": True}))
    for active in (["other"], ["default", "other"]):
        stock.base_model.set_adapter(active)
        assert sum("lora_" in name for name in _same(moe, stock)) == 4 * len(active)


def _options(model):
    config = model.peft_config["default"]
    return {name: getattr(config, name) for name in ("lora_alpha", "init_lora_weights", "target_parameters")}


def test_a_token_without_an_expert(moe):
    # An index of E stands for none: the module's own code passes over it.
    stock = moe.both(dtype=torch.float64)
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    x, index, weights = moe.call(dtype=torch.float64)
    index[2], index[4, 0] = moe.experts, moe.experts
    grad = torch.randn_like(x)
    got, wanted = (moe.step(model, x, index, weights, grad) for model in (ours, stock))
    torch.testing.assert_close(got, wanted)
    assert not got["y"][2].any() and peftkern.status(ours).fused == 1


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(moe, tokens):
    stock = moe.both(dtype=torch.float64)
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    given = moe.call(tokens, torch.float64)
    torch.testing.assert_close(ours(*given), stock(*given))
    assert peftkern.status(ours).fused == 1


def _errors(moe, stock, exact, dtype, autocast):
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    found = {}
    for _ in range(6):
        given = moe.call(40, torch.float32 if autocast else dtype)
        grad = torch.randn(40, moe.columns).to(dtype)
        x, index, weights = given
        wide = moe.step(exact, x.double(), index, weights.double(), grad.double())
        with torch.autocast("cpu", dtype, enabled=autocast):
            answers = [moe.step(model, *given, grad) for model in (ours, stock)]
        assert answers[0].keys() == answers[1].keys() == wide.keys()
        for name, right in wide.items():
            assert answers[0][name].dtype == answers[1][name].dtype, name
            found.setdefault(name, []).append([*(a[name].double() - right for a in answers), right])
    status = peftkern.status(ours)
    assert (status.fused, status.stock) == (6, 0)
    return found


@pytest.mark.parametrize("autocast", [False, True], ids=["half base", "autocast"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind, implementation", [("gate", "grouped_mm"), ("transposed, bias, interleaved", "eager")])
def test_half_precision(moe, kind, implementation, dtype, autocast):
    """Errors against fp64 at most 1.5 times PEFT's, or below half an ulp of the largest value."""
    stock = moe.both(kind, implementation, torch.float32 if autocast else dtype)
    exact = copy.deepcopy(stock).double()
    exact.base_model.model.experts.get_base_layer().config._experts_implementation = "eager"  # grouped_mm takes no fp64
    for errors in _errors(moe, stock, exact, dtype, autocast).items():
        name, (ours, theirs, right) = errors[0], (torch.cat(t) for t in zip(*errors[1], strict=True))
        floor = 0.5 * right.abs().max() * torch.finfo(dtype).eps / 2
        error, allowed = (t.square().mean().sqrt() for t in (ours, theirs))
        assert error <= max(1.5 * allowed, floor), f"{name}: error {error:.3g}, PEFT's {allowed:.3g}"

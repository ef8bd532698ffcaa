"""Compiled layers of every method compute what they compute eagerly, and train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peftkern
from peftkern.methods import METHODS, tuner

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")

K, N = 24, 20
COMPILED = [n for n, m in METHODS.items() if m.op != "multi_lora_linear" and m.layer is not None and m.of is None]


def _step(call, model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    y.square().sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    }


def _same(model, backend):
    peftkern.accelerate(model)
    x = torch.randn(6, K)
    eager = _step(model, model, x)
    assert peftkern.status(model).stock == 0 and len(eager) > 2
    torch._dynamo.reset()  # one frame for all models: PEFT's
    compiled = _step(torch.compile(model, fullgraph=True, backend=backend), model, x)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", COMPILED)
def test_layer(name):
    method = METHODS[name]
    _same(next(iter(method.examples(K, N).values())).train(method.trains), "aot_eager")


def test_dora_that_drops():
    model = METHODS["DoRA"].examples(K, N)["linear"].train()
    model.base_model.model[0].lora_dropout["default"] = nn.Dropout(0.4)
    peftkern.accelerate(model)
    x, found = torch.randn(6, K), []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        torch.manual_seed(3)
        found.append(_step(call, model, x))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_inductor():
    def of(config):
        return tuner.layer(nn.Linear(K, K), config)

    dora = peft.LoraConfig(target_modules=["0"], r=4, use_dora=True, init_lora_weights=False)
    vera = peft.VeraConfig(target_modules=["0"], r=5, d_initial=0.7)
    model = nn.Sequential(of(dora), nn.Tanh(), of(vera), peftkern.LoRALinear(K, N, r=3, use_dora=True))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lambda_b" in name or name == "3.lora_B":
                p.normal_()
    _same(model, "inductor")

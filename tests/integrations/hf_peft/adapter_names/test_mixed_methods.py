"""Batches whose rows take adapters of several methods, which PEFT refuses: each row as its adapter alone computes it."""

import copy

import pytest
import torch
from torch import nn

import peftkern
from peftkern.integrations import hf_peft

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")

NAMES = ["dora", "__base__", "default", "kasa2", "dora", "biased", "default"]


@pytest.fixture
def model():
    def config(**options):
        return peft.LoraConfig(target_modules=["0", "1"], r=4, lora_alpha=6, init_lora_weights=False, **options)

    base = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 12))
    model = peft.get_peft_model(base, config())
    model.add_adapter("dora", config(use_dora=True))
    model.add_adapter("biased", config(lora_bias=True))
    model.add_adapter("kasa2", config(use_dora=True, use_rslora=True))
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p) if "magnitude" not in name else nn.init.uniform_(p, 0.5, 2.0)
    return model


def _alone(model, x):
    rows = []
    for row, name in zip(x, NAMES, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(row[None]))
        else:
            model.set_adapter(name)
            rows.append(model(row[None]))
    return torch.cat(rows)


@pytest.mark.parametrize("training", [False, True])
def test_each_row_is_its_adapter_alone(model, training):
    x = torch.randn(len(NAMES), 3, 24)
    with pytest.raises(ValueError, match="DoRA"):
        copy.deepcopy(model).eval()(x, adapter_names=NAMES)
    expected = _alone(model, x)
    peftkern.accelerate(model)
    model.train(training)
    for layer in model.base_model.model:
        layer.set_adapter(list(model.peft_config))
    given = x.clone().requires_grad_()
    y = model(given, adapter_names=NAMES)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    y.backward(dy)
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("magnitude" in name for name in ours) and peftkern.status(model).stock == 0

    # Row by row, in stock PEFT and fp64.
    peftkern.restore(model)
    model.double().zero_grad()
    exact = x.double().requires_grad_()
    model.eval()
    for name, index in zip(NAMES, range(len(NAMES)), strict=True):
        if name == "__base__":
            with model.disable_adapter():
                model(exact[index : index + 1]).backward(dy[index : index + 1].double())
        else:
            model.set_adapter(name)
            model(exact[index : index + 1]).backward(dy[index : index + 1].double())
    torch.testing.assert_close(given.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)
    for name, p in model.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name].double(), p.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_what_cannot_be_mixed_is_named(model):
    peftkern.accelerate(model)
    x = torch.randn(len(NAMES), 3, 24)
    model.add_adapter("drops", peft.LoraConfig(target_modules=["0"], use_dora=True, lora_dropout=0.5))
    layer = model.base_model.model[0]
    peftkern.accelerate(model.train())
    names = ["drops"] * len(NAMES)
    assert "another base product" in hf_peft.why_not(layer, x, names)
    assert hf_peft.why_not(layer.eval(), x, names) is None

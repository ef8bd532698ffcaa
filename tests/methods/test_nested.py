"""Layers around layers, as PeftMixedModel stacks the methods that it knows: one fused call takes them all."""

import copy

import pytest
import torch
from torch import nn

import peftkern
from peftkern.integrations.hf_peft import forward as hf_peft_forward
from peftkern.methods import unchanged

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
# That a layer runs PEFT's own code after a change is what the tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*was reported as accelerated")

K, N = 24, 20


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False, **options})


def adalora(**options):
    return peft.AdaLoraConfig(init_r=6, target_r=3, total_step=10, lora_alpha=5, target_modules=["0"], **options)


def build(configs, linear=None):
    """A PeftMixedModel of one layer with these adapters, named "0", "1" and so on, all of them active."""
    model = peft.get_peft_model(nn.Sequential(linear or nn.Linear(K, N)), configs[0], "0", mixed=True)
    for name, config in enumerate(configs[1:], 1):
        model.add_adapter(str(name), config)
    model.set_adapter([str(name) for name in range(len(configs))])
    for name, p in model.named_parameters():
        if "magnitude" in name:
            nn.init.uniform_(p, 0.5, 2.0)
        elif "lora_E" in name:
            nn.init.normal_(p)
    return model


def pair(*configs, linear=None):
    """An accelerated model, the same one as PEFT has it, and its outermost layer."""
    ours = build(configs, linear)
    stock = copy.deepcopy(ours)
    report = peftkern.accelerate(ours)
    assert len(report.accelerated) == sum(hasattr(m, "lora_A") for m in ours.modules()), report
    return ours, stock, ours.base_model.model[0]


def inputs():
    return [torch.randn(*shape) for shape in ((5, K), (2, 3, K), (0, K))]


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(N, K)


CASES = {
    "LoRA around AdaLoRA": lambda: pair(adalora(), lora()),
    "AdaLoRA around LoRA": lambda: pair(lora(), adalora()),
    "AdaLoRA around LoRA and rsLoRA": lambda: pair(lora(), lora(r=7, use_rslora=True), adalora()),
    "three levels": lambda: pair(lora(), adalora(), lora(r=3)),
    "lora_bias and DoRA around it": lambda: pair(adalora(), lora(lora_bias=True), lora(use_dora=True)),
    "AdaLoRA around DoRA": lambda: pair(lora(use_dora=True), adalora()),
    "without bias": lambda: pair(adalora(), lora(), linear=nn.Linear(K, N, bias=False)),
    "Conv1D": lambda: pair(adalora(fan_in_fan_out=True), lora(fan_in_fan_out=True), linear=conv1d()),
}


@pytest.mark.parametrize("case", CASES)
def test_parity(agree, case):
    ours, stock, layer = CASES[case]()
    assert type(layer.base_layer) not in (nn.Linear, type(conv1d())), "not nested"
    agree(ours, stock, inputs(), case)
    assert (peftkern.status(ours).fused, peftkern.status(ours).stock) == (3, 0)


@pytest.mark.parametrize("active", [["0"], ["1"], ["1", "0"]])
def test_active_adapters_of_any_level(agree, active):
    ours, stock, _ = pair(adalora(), lora())
    for model in (stock, ours):
        model(torch.randn(5, K))
        model.set_adapter(active)
        for p in model.parameters():
            p.requires_grad_(p.ndim == 2 and p is not model.base_model.model[0].get_base_layer().weight)
    agree(ours, stock, inputs(), f"active: {active}")
    assert peftkern.status(ours).stock == 0


def test_each_level_has_its_dropout():
    ours, _, layer = pair(lora(lora_dropout=0.5), adalora(lora_dropout=0.25))
    x = torch.ones(4096, K)
    for weight in (layer.base_layer.lora_B["0"].weight, layer.lora_B["1"]):
        own = weight.detach().clone()
        nn.init.zeros_(weight.data)
        changes = (ours(x) - ours(x)).abs().amax(0) > 1e-6
        assert changes.any(), "the other level drops nothing"
        weight.data.copy_(own)
    mean, exact = ours(x).mean(0), ours.eval()(x).mean(0)
    torch.testing.assert_close(mean, exact, rtol=0.1, atol=0.3)


def _hook(inner, patch):
    inner.register_forward_hook(lambda module, args, y: y + 1.0)


def _replaced_on_the_class(inner, patch):
    own = type(inner).forward

    def forward(self, *args, **kwargs):
        return own(self, *args, **kwargs) + 1.0

    patch.setattr(type(inner), "forward", forward)


def _merged(inner, patch):
    with torch.no_grad():
        inner.merge()
        inner.get_base_layer().weight += 0.5


CHANGES = {
    "hook": _hook,
    "forward": lambda inner, patch: setattr(inner, "forward", inner.base_layer.forward),
    "class": _replaced_on_the_class,
    "disabled": lambda inner, patch: inner.enable_adapters(False),
    "merged": _merged,
    "scaling": lambda inner, patch: inner.scaling.update({"0": 50.0}),
    "none active": lambda inner, patch: inner._active_adapter.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_inside_is_seen(monkeypatch, change):
    ours, stock, layer = pair(adalora(), lora())
    x = torch.randn(5, K)
    before = ours(x)
    assert unchanged.Unchanged is None or layer.__dict__[hf_peft_forward.CALLS].kept.plan(layer, x) is not None
    for model in (ours, stock):
        with monkeypatch.context() as patch:
            CHANGES[change](model.base_model.model[0].base_layer, patch)
            y = model(x)
        if model is ours:
            found = y
    assert not torch.allclose(before, found)
    torch.testing.assert_close(found, y)


@pytest.mark.skipif(unchanged.Unchanged is None, reason="the native code is not built: no plan is kept")
def test_later_calls_look_no_more(monkeypatch):
    ours, *_ = pair(adalora(), lora())
    x = torch.randn(5, K)
    first = ours(x)

    def careful(*args):
        raise AssertionError("a careful look")

    monkeypatch.setattr(hf_peft_forward, "look_at_call", careful)
    assert torch.equal(ours(x), first)


def test_a_method_that_is_not_covered_inside_is_named(agree):
    loha = peft.LoHaConfig(r=2, target_modules=["0"], init_weights=False)
    ours = build([loha, lora()])
    stock = copy.deepcopy(ours)
    report = peftkern.accelerate(ours)
    reasons = set(report.skipped.values())
    assert any("base_layer is a peft.tuners.loha" in reason for reason in reasons), report
    agree(ours, stock, inputs(), "LoRA around LoHa")


def test_what_stands_around_a_covered_layer_may_be_anything(agree):
    ours = build([lora(), peft.LoHaConfig(r=2, target_modules=["0"], init_weights=False)])
    stock = copy.deepcopy(ours)
    peftkern.accelerate(ours)
    agree(ours, stock, inputs(), "LoHa around LoRA")
    assert peftkern.status(ours).fused == 3


def test_merging_and_unloading_are_peft_s():
    ours, stock, _ = pair(adalora(), lora())
    x = torch.randn(5, K)
    ours(x)
    assert torch.equal(ours.merge_and_unload()(x), stock.merge_and_unload()(x))

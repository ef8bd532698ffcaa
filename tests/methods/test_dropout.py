"""Dropout in training, through PEFT's layers and the functions: one mask a pass, and its law."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

import peftkern
from peftkern.methods import METHODS

pytest.importorskip("peft", reason="HF PEFT is not installed")

K, N, P = 8, 8, 0.4
# Methods whose layers drop, and where they keep the dropout of an adapter.
DROPS = {
    "LoRA": "lora_dropout", "DoRA": "lora_dropout", "KaSA": "lora_dropout", "MiCA": "lora_dropout", "VeRA": "vera_dropout",
    "AdaLoRA": "lora_dropout", "DeLoRA": "delora_dropout", "TinyLoRA": "tinylora_dropout", "MiSS": "miss_dropout",
    "Uni-LoRA": "unilora_dropout", "PSOFT": "psoft_dropout", "GraLoRA": "gralora_dropout", "BD-LoRA": "lora_dropout",
    "RandLoRA": "randlora_dropout", "VB-LoRA": "vblora_dropout",
}  # fmt: skip


def _model(name, case=0):
    """An accelerated model of one layer, in fp64, with this much dropout, in training."""
    model = list(METHODS[name].examples(K, N).values())[case].double().train()
    layer = model.base_model.model[0]
    for adapter in getattr(layer, DROPS[name]):
        getattr(layer, DROPS[name])[adapter] = nn.Dropout(P)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    peftkern.accelerate(model)
    return model


def test_every_method_that_drops_is_here():
    drops = {
        name
        for name, method in METHODS.items()
        if method.op == "lora_linear" and method.layer is not None and method.trains
        and any("dropout" in part for part, _ in next(iter(method.examples(24, 24).values())).named_modules())
    }  # fmt: skip
    # Of Arrow, HiRA and FRoD training with dropout stays the library's; DEFT's is in fp32, and what it takes out is not dropped:
    # its own tests.
    assert drops - {"Arrow", "HiRA", "FRoD", "DEFT"} == DROPS.keys()


class Shared(nn.Module):
    """Dropout by the mask of seed 5."""

    def forward(self, x):
        keep = peftkern.dropout_mask(x.numel() // x.shape[-1], x.shape[-1], P, 5)
        return torch.where(keep.view(x.shape), x / (1 - P), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", DROPS)
def test_by_the_mask_that_the_library_has_too(agree, on_base, monkeypatch, name, dtype):
    on_base(dtype)
    for module in ("peftkern.autograd.lora_linear", "peftkern.methods.linear"):  # where adapters draw their seeds
        monkeypatch.setattr(
            sys.modules[module], "seed_tensor", lambda seed, device: torch.tensor([5]) if seed is None else seed
        )
    for case, stock in METHODS[name].examples(24, 20).items():
        for p in stock.parameters():  # some start at zero
            if p.requires_grad:
                nn.init.normal_(p)
        stock, ours = (copy.deepcopy(stock).train() for _ in range(2))
        for model, dropout in ((stock, Shared()), (ours, nn.Dropout(P))):
            of = getattr(model.base_model.model[0], DROPS[name])
            of.update(dict.fromkeys(of, dropout))
        peftkern.accelerate(ours)
        inputs = [torch.randn(*shape).to(dtype) for shape in ((5, 24), (2, 3, 24)) * 4]
        agree(ours, stock, inputs, f"{name}, {case}, {dtype}")
        assert (peftkern.status(ours).fused, peftkern.status(ours).stock) == (8, 0)


def _differences(call, tensors, dy):
    """The gradient of sum(dy * call()) by finite differences."""
    step, found = 1e-6, []
    for t in tensors:
        g = torch.zeros_like(t)
        for i in range(t.numel()):
            at = t.data.view(-1)
            before = at[i].item()
            at[i] = before + step
            above = (call() * dy).sum()
            at[i] = before - step
            below = (call() * dy).sum()
            at[i] = before
            g.view(-1)[i] = (above - below) / (2 * step)
        found.append(g)
    return found


@pytest.mark.parametrize("name", [n for n in DROPS if n != "DoRA"])  # whose norm is a constant: see below
def test_backward_drops_what_forward_dropped(name):
    model = _model(name)
    x, dy = torch.randn(3, K, dtype=torch.float64, requires_grad=True), torch.randn(3, N, dtype=torch.float64)

    def call():
        torch.manual_seed(11)
        return model(x)

    trained = [x, *(p for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n)]
    y = call()
    assert peftkern.status(model).fused == 1
    gradients = torch.autograd.grad(y, trained, dy)
    with torch.no_grad():
        assert not torch.equal(model(x), y), "another mask"
        expected = _differences(call, trained, dy)
    for got, want in zip(gradients, expected, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", range(5), ids=list(METHODS["DoRA"].examples(K, N)))
def test_dora_drops_what_forward_dropped(case, monkeypatch):
    model = _model("DoRA", case)
    x, dy = torch.randn(3, K, dtype=torch.float64, requires_grad=True), torch.randn(3, N, dtype=torch.float64)
    norms, norm = [], peftkern.methods.low_rank.dora.row_norm
    monkeypatch.setattr(peftkern.methods.low_rank.dora, "row_norm", lambda *a: norms.append(norm(*a)) or norms[-1])

    def call():
        torch.manual_seed(11)
        return model(x)

    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(call(), trained, dy)
    # The norm is a constant of the graph, so it must not move with the weights.
    constants = list(norms)

    def fixed(*args):
        norms.append(None)
        return constants[(len(norms) - 1) % len(constants)]

    monkeypatch.setattr(peftkern.methods.low_rank.dora, "row_norm", fixed)
    norms.clear()
    with torch.no_grad():
        expected = _differences(call, trained, dy)
    assert peftkern.status(model).stock == 0
    for got, want in zip(gradients, expected, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", DROPS)
def test_the_mean_over_masks_is_the_function_without_dropout(name):
    # 4,000 rows of one x are as many masks: a mean is off by a few standard errors at most.
    model, x = _model(name), torch.randn(1, K, dtype=torch.float64)
    torch.manual_seed(3)
    with torch.no_grad():
        many = model(x.expand(4000, K))
        expected = model.eval()(x)[0]
    assert peftkern.status(model).stock == 0
    error, deviation = (many.mean(0) - expected).abs(), many.std(0)
    assert (deviation > 0).all() and (error <= 5 * deviation / 4000**0.5).all()
    # As many values as masks of the row: each element is kept or dropped by itself.
    assert len(torch.unique(many[:, 0].round(decimals=9))) == 2**K


@pytest.mark.parametrize("name", DROPS)
def test_kept_values_are_divided(name):
    # The law to its last moment: the variance of y is p / (1 - p) times the squares of what each column gives.
    model, x = _model(name), torch.randn(1, K, dtype=torch.float64)
    torch.manual_seed(4)
    with torch.no_grad():
        many = model(x.expand(4000, K))
        model.eval()
        base = model.base_model.model[0].get_base_layer()
        each = torch.diag(x[0])
        delta = model(each) - model(torch.zeros_like(each)) - (base(each) - base(torch.zeros_like(each)))
        expected = (P / (1 - P) * delta.square()).sum(0)
    torch.testing.assert_close(many.var(0), expected, rtol=0.15, atol=0.0)


def test_checkpointing_draws_the_same_mask():
    model = _model("DoRA")
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    found = []
    for call in (model, lambda t: torch.utils.checkpoint.checkpoint(model, t, use_reentrant=False)):
        torch.manual_seed(2)
        model.zero_grad()
        call(x).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found)

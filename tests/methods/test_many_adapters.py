"""Adapters of many methods over one layer, made of the library's own layers: a list, a bank, and each adapter alone."""

import copy

import pytest
import torch
from torch import nn

import peftkern
from peftkern.integrations.hf_peft import guard
from peftkern.methods import METHODS, tuner

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")

K, N, ROWS = 40, 36, 480


def lora(**options):
    return peft.LoraConfig(target_modules=["0"], lora_alpha=6, init_lora_weights=False, **options)


def ia3(*inside):
    return peft.IA3Config(target_modules=["0"], feedforward_modules=list(inside))


EIGHT = {
    "LoRA": lora(r=4), "rsLoRA": lora(r=9, use_rslora=True), "DoRA": lora(r=4, use_dora=True),
    "DoRA, rank 3": lora(r=3, use_dora=True), "VeRA": peft.VeraConfig(target_modules=["0"], r=12),
    "VeRA again": peft.VeraConfig(target_modules=["0"], r=12), "(IA)^3": ia3(), "(IA)^3 of the input": ia3("0"),
}  # fmt: skip


def randomised(models):
    for model in models.values():
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.3 * torch.randn(p.shape)
    return models


def on_one_base(configs):
    """The library's model of one layer for each of these configs, all over the same base."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N).requires_grad_(False)
    return linear, randomised({name: tuner.layer(linear, config) for name, config in configs.items()})


def held(model):
    (adapter,) = guard.static_plan(model.base_model.model[0]).held
    return adapter


def near(errors, what):
    """Near the library's own results and the same in fp64. ``errors``: (ours, the library's, exact) of several batches, since
    the errors of few numbers are left to chance."""
    ours, stock, exact = (torch.cat([t.flatten().double() for t in each]) for each in zip(*errors, strict=True))
    error, allowed = ((t - exact).square().mean().sqrt().item() for t in (ours, stock))
    assert error <= max(1.5 * allowed, 2.0**-22 * exact.abs().max().item()), f"{what}: {error:.3g}, {allowed:.3g}"


def alone(model, x, dy):
    """The library's y of these rows, and gradients of all that trains and of x."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, **{n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}}


def check_list(linear, models, batches=6):
    """One call for all rows, forward and backward: each row and each gradient as by the adapter alone."""
    ids, errors = torch.arange(ROWS) % (len(models) + 1) - 1, {}
    exact, stock = (
        {name: copy.deepcopy(m).to(dtype) for name, m in models.items()} for dtype in (torch.double, torch.float)
    )
    for _ in range(batches):
        x, dy = torch.randn(ROWS, K, requires_grad=True), torch.randn(ROWS, N)
        adapters = [held(m).adapter(linear.weight, linear.bias) for m in models.values()]
        y = peftkern.multi_lora_linear(x, linear.weight, adapters, ids, bias=linear.bias)
        for model in models.values():
            model.zero_grad()
        y.backward(dy)
        y, given = y.detach(), x.detach()
        torch.testing.assert_close(y[ids == -1], linear(given[ids == -1]), rtol=1e-5, atol=1e-5)
        for i, (name, model) in enumerate(models.items()):
            rows = ids == i
            ours = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            found = {"y": y[rows], "x": x.grad[rows], **ours}
            wants = [
                alone(m[name], *(t[rows].to(dtype) for t in (given, dy)))
                for m, dtype in ((stock, torch.float), (exact, torch.double))
            ]
            assert found.keys() == wants[1].keys()
            for key in found:
                errors.setdefault(f"{name}: {key}", []).append([found[key], *(want[key] for want in wants)])
    for what, of in errors.items():
        near(of, what)
    return y


def check_bank(linear, models):
    """The same rows from a bank."""
    x, ids = torch.randn(ROWS, K), torch.arange(ROWS) % (len(models) + 1) - 1
    bank = peftkern.AdapterBank(K, N, max_adapters=len(models), max_rank=64)
    for name, model in models.items():
        a = held(model).adapter(linear.weight, linear.bias)
        with torch.no_grad():
            bank.add(name, a.lora_A, a.lora_B, a.scaling, bias=a.bias, **a.coefficients)
    names = [None, *models]
    y = peftkern.multi_lora_linear(x, linear.weight, bank, bank.ids([names[i + 1] for i in ids]), bias=linear.bias)
    for i, (name, model) in enumerate(models.items()):
        rows = ids == i
        exact = copy.deepcopy(model).double()(x[rows].double())
        near([[y[rows], model(x[rows]), exact]], f"{name} in a bank")


def test_eight_adapters_of_four_methods():
    linear, models = on_one_base(EIGHT)
    assert sorted(held(m).method.name for m in models.values()) == sorted(["LoRA", "DoRA", "VeRA", "(IA)^3"] * 2)
    y = check_list(linear, models)
    assert len({tuple(row.tolist()) for row in y}) == ROWS
    check_bank(linear, models)


def test_every_method_that_mixes():
    """The first example that the registry has of each, moved onto one base."""
    torch.manual_seed(0)
    linear, models = nn.Linear(K, N).requires_grad_(False), {}
    for name, method in METHODS.items():
        if method.mixed and method.layer is not None and name != "aLoRA":  # which acts on some of the tokens
            model = next(iter(method.examples(K, N).values()))
            with torch.no_grad():
                model.base_model.model[0].get_base_layer().weight.copy_(linear.weight)
                model.base_model.model[0].get_base_layer().bias.copy_(linear.bias)
            models[name] = copy.deepcopy(model).train(method.trains)  # without OSF's hooks on its tensors
    assert len(models) >= 14
    check_list(linear, randomised(models))
    check_bank(linear, models)

"""Dropout of accelerated layers: its law, its gradients, its seeds, and activation checkpointing."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern

K = 64


def transparent(zoo, p, adapters=("default",), scalings=(1.0,)):
    """A layer whose output for x = 1 is the dropout mask itself: W = 0, A = B = identity."""
    model, layer = zoo.layer(K, K, bias=False, r=K, lora_alpha=K, lora_dropout=p[0])
    for name, q in list(zip(adapters, p))[1:]:
        config = zoo.peft.LoraConfig(target_modules=["0"], r=K, lora_alpha=K, lora_dropout=q)
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        for name, scaling in zip(adapters, scalings):
            layer.lora_A[name].weight.copy_(torch.eye(K))
            layer.lora_B[name].weight.copy_(torch.eye(K))
            layer.scaling[name] = scaling
    peftkern.accelerate(model)
    return model.train(), layer


def share_is(kept, p):
    n = kept.numel()
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_law_and_gradient(zoo, fused, p):
    _, layer = transparent(zoo, [p])
    x = torch.ones(2000, K, requires_grad=True)
    y = layer(x)
    y.backward(torch.full_like(y, 3.0))
    kept = y.detach() != 0
    assert len(fused) == 1
    torch.testing.assert_close(y.detach(), kept / (1 - p), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(x.grad, 3.0 * y.detach(), rtol=1e-6, atol=0.0)
    share_is(kept, p)
    again = layer(x) != 0
    share_is(kept ^ again, 1 - 2 * p * (1 - p))  # two calls are independent
    share_is(kept[:, 1:] ^ kept[:, :-1], 1 - 2 * p * (1 - p))
    share_is(kept[1:] ^ kept[:-1], 1 - 2 * p * (1 - p))


def test_every_adapter_has_its_own_mask(zoo, fused):
    p, scalings = (0.5, 0.25, 0.0), (1.0, 4.0, 100.0)
    _, layer = transparent(zoo, p, ("default", "b", "c"), scalings)
    x = torch.ones(2000, K, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach(), rtol=1e-5, atol=1e-4)
    assert len(fused) == 1
    rest = y.detach() - 100.0
    b = rest > 4.0
    a = rest - b * (4.0 / 0.75) > 1.0
    torch.testing.assert_close(rest, b * (4.0 / 0.75) + a * 2.0, rtol=1e-4, atol=1e-4)
    share_is(a, 0.5), share_is(b, 0.25)
    share_is(a & b, 1 - 0.5 * 0.75)


def test_every_projection_has_its_own_mask(zoo):
    _, first = transparent(zoo, [0.5])
    _, second = transparent(zoo, [0.5])
    x = torch.ones(2000, K)
    share_is((first(x) != 0) ^ (second(x) != 0), 0.5)


def test_the_dropout_module_decides(zoo):
    model, layer = transparent(zoo, [0.5])
    x = torch.ones(5, K)
    model.eval()
    assert torch.equal(layer(x), x)
    layer.lora_dropout.train()  # PEFT asks the dropout module, not the layer
    assert not torch.equal(layer(x), x)
    model.train()
    layer.lora_dropout.eval()
    assert torch.equal(layer(x), x)
    layer.lora_dropout.train()
    layer.lora_dropout["default"].p = 0.0
    assert torch.equal(layer(x), x)
    layer.lora_dropout["default"] = nn.Identity()
    assert torch.equal(layer(x), x)


def test_manual_seed_reproduces(zoo):
    _, layer = transparent(zoo, [0.5])
    x = torch.ones(50, K)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first) and torch.equal(layer(x), second) and not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("adapters", [("default",), ("default", "b")])
def test_checkpointing_draws_the_same_bits(zoo, fused, reentrant, adapters):
    _, layer = transparent(zoo, [0.5] * len(adapters), adapters, [1.0] * len(adapters))
    x = torch.randn(30, K)
    results = []
    for run in (layer, lambda t: checkpoint(layer, t, use_reentrant=reentrant)):
        torch.manual_seed(7)
        layer.zero_grad()
        leaf = x.clone().requires_grad_(True)
        y = run(leaf)
        (y * y).sum().backward()
        grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        results.append([y.detach(), leaf.grad, *grads])
    assert len(fused) == 3 and len(results[0]) == 2 + 2 * len(adapters)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_model_has_the_gradients_of_a_plain_one(zoo, reentrant):
    results = []
    for checkpointed in (False, True):
        model = zoo.build("llama", lora_dropout=0.3).train()
        peftkern.accelerate(model)
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(7)
        results.append(zoo.loss_and_gradients(model, zoo.batch("llama")))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][2].keys() == results[1][2].keys()
    assert all(torch.equal(results[0][2][n], results[1][2][n]) for n in results[0][2])

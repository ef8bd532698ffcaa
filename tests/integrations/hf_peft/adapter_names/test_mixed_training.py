"""``adapter_names`` in training, where PEFT raises: every adapter's gradients are those of its rows alone."""

import functools
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.integrations.hf_peft import forward as hf_peft_forward

NAMES = ["first", "__base__", "second", "third", "first", "second"]


def trained(model, adapters=("first", "second", "third")):
    """The model in training mode, with these adapters requiring gradients."""
    model.base_model.set_adapter(list(adapters))
    return model.train()


def loss(logits, rows):
    """A fixed random sum over the logits of these rows of the batch."""
    weights = torch.randn((len(NAMES), *logits.shape[1:]), generator=torch.Generator().manual_seed(17))
    return (logits * weights.to(logits.dtype)[rows]).sum()


def together(zoo, model, inputs):
    model.zero_grad()
    loss(model(inputs, adapter_names=NAMES).logits, slice(None)).backward()
    return zoo.gradients(model)


def each_alone(zoo, model, inputs):
    """Gradients by PEFT's own code: each adapter active by itself on its own rows."""
    result = {}
    for adapter in ("first", "second", "third"):
        rows = [i for i, name in enumerate(NAMES) if name == adapter]
        trained(model, [adapter])
        model.zero_grad()
        loss(model(inputs[rows]).logits, rows).backward()
        result.update({n: g for n, g in zoo.gradients(model).items() if f".{adapter}." in n})
    return result


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_gradients_are_those_of_each_adapter_alone(zoo, fused_mixed, kind):
    model = zoo.several(kind)
    inputs = zoo.batch(kind, rows=len(NAMES))["input_ids"]
    stock = each_alone(zoo, model, inputs)
    exact = each_alone(zoo, zoo.copy(model).double(), inputs)
    peftkern.accelerate(model)
    ours = together(zoo, trained(model), inputs)
    assert len(fused_mixed) == len(zoo.lora_layers(model))
    assert ours.keys() == stock.keys() == exact.keys() and len(ours) > 20
    assert min(g.abs().max().item() for g in exact.values()) > 0
    scale = max(g.abs().max().item() for g in exact.values())
    for name in ours:
        zoo.as_accurate(ours[name], stock[name], exact[name], scale)


def test_adapters_that_are_not_in_the_batch_get_no_gradient(zoo):
    model = zoo.several("llama")
    peftkern.accelerate(model)
    inputs = zoo.batch("llama", rows=2)["input_ids"]
    trained(model)(inputs, adapter_names=["second", "__base__"]).logits.sum().backward()
    assert zoo.gradients(model) and all(".second." in name for name in zoo.gradients(model))


def test_frozen_adapters_get_no_gradient(zoo):
    model = zoo.several("llama")
    peftkern.accelerate(model)
    inputs = zoo.batch("llama", rows=len(NAMES))["input_ids"]
    together(zoo, trained(model, ["third"]), inputs)
    assert zoo.gradients(model) and all(".third." in name for name in zoo.gradients(model))


def test_lora_bias_and_tensor_scaling(zoo, fused_mixed):
    model, layer = zoo.layer(lora_bias=True)
    model.add_adapter("b", zoo.peft.LoraConfig(target_modules=["0"], r=3))
    zoo.randomise(model)
    model.base_model.set_adapter(["default", "b"])
    layer.scaling["b"] = torch.tensor(0.7)
    names = ["b", "default", "__base__", "default"]
    x = torch.randn(4, 5, 24, requires_grad=True)
    results = []
    for accelerated in (False, True):
        if accelerated:
            peftkern.accelerate(model)
        layer.zero_grad()
        x.grad = None
        y = layer(x, adapter_names=names)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, zoo.gradients(layer)))
    assert len(fused_mixed) == 1
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert any("bias" in name for name in results[0][2])


def test_dropout_is_each_adapters_own(zoo, fused_mixed):
    model, layer = zoo.layer(lora_dropout=0.5)
    model.add_adapter("none", zoo.peft.LoraConfig(target_modules=["0"], lora_dropout=0.0))
    zoo.randomise(model)
    peftkern.accelerate(model)
    names = ["default", "none", "__base__", "default"]
    x = torch.randn(4, 6, 24)
    exact = layer.eval()(x, adapter_names=names)
    layer.train()
    torch.manual_seed(3)
    y = layer(x, adapter_names=names)
    torch.manual_seed(3)
    assert torch.equal(layer(x, adapter_names=names), y)
    assert not torch.equal(layer(x, adapter_names=names), y)
    assert torch.equal(y[1:3], exact[1:3])
    # The bits, by hand: the seed is drawn as one int64 from torch's generator.
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    mask = peftkern.dropout_mask(24, 24, 0.5, seed).view(4, 6, 24)
    branch = layer.lora_B["default"](layer.lora_A["default"](x * mask * 2.0)) * layer.scaling["default"]
    expected = layer.base_layer(x) + branch
    torch.testing.assert_close(y[[0, 3]], expected[[0, 3]], rtol=1e-5, atol=1e-5)
    mean = torch.stack([layer(x, adapter_names=names) for _ in range(400)]).mean(0)
    assert (mean - exact).abs().max() < 0.5 * (y - exact).abs().max()


def test_dropout_is_that_of_the_gradients(zoo):
    model, layer = zoo.layer(lora_dropout=0.5, bias=False)
    zoo.randomise(model)
    peftkern.accelerate(model)
    layer.train()
    with torch.no_grad():
        layer.base_layer.weight.zero_()
    x = torch.randn(4, 6, 24, requires_grad=True)
    names = ["default", "__base__", "default", "default"]
    y = layer(x, adapter_names=names)
    y.backward(torch.ones_like(y))
    # Linear in x: <dy, y> = <dx, x>, and the same for lora_A and lora_B, only with the same mask both ways.
    total = y.detach().double().sum()
    for value, grad in ((x, x.grad), *((p, p.grad) for p in layer.parameters() if p.grad is not None)):
        torch.testing.assert_close((value.double() * grad.double()).sum(), total, rtol=1e-4, atol=1e-4)
    assert (x.grad == 0).double().mean() > 0.4


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(zoo, fused_mixed, reentrant):
    model = zoo.several("llama", first={"lora_dropout": 0.3}, second={"r": 9}, third={"r": 2})
    peftkern.accelerate(model)
    inputs = zoo.batch("llama", rows=len(NAMES))["input_ids"]
    trained(model)
    torch.manual_seed(4)
    expected = together(zoo, model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    fused_mixed.clear()
    torch.manual_seed(4)
    ours = together(zoo, model, inputs)
    assert len(fused_mixed) == 2 * 12
    torch.testing.assert_close(ours, expected)
    assert not any(m._forward_pre_hooks for m in zoo.lora_layers(model).values())
    # Without names again: nothing of them is left.
    model.zero_grad()
    model(inputs).logits.sum().backward()
    assert len(fused_mixed) == 2 * 12


class Outer(nn.Module):
    """A model that checkpoints a layer by itself, so that nobody can bring the names back."""

    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = nn.Linear(24, 20), reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_loses_the_names_is_an_error(zoo, reentrant):
    config = zoo.peft.LoraConfig(target_modules=["inner"], init_lora_weights=False)
    model = zoo.peft.get_peft_model(Outer(reentrant), config, adapter_name="first").train()
    peftkern.accelerate(model)
    x = torch.randn(2, 3, 24, requires_grad=True)
    y = model(x, adapter_names=["first", "__base__"])
    with pytest.raises(RuntimeError, match="recomputed in backward"):
        y.sum().backward()
    model(x).sum().backward()
    assert x.grad is not None


def test_a_failed_step_leaves_no_names_behind(zoo, monkeypatch):
    model = zoo.several("llama")
    peftkern.accelerate(model)
    inputs = zoo.batch("llama", rows=3)["input_ids"]
    trained(model)
    last = model.get_base_model().lm_head
    monkeypatch.setattr(last, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(inputs, adapter_names=["first", "second", "third"])
    monkeypatch.undo()
    assert not any(m._forward_pre_hooks for m in zoo.lora_layers(model).values())
    assert model.base_model.training and model.training
    model(inputs[:1]).logits.sum().backward()


def test_only_accelerated_models_train(zoo):
    velora = zoo.peft.VeloraConfig(num_groups=4)
    model = zoo.several("llama", first={}, velora={"velora_config": velora})
    inputs = zoo.batch("llama", rows=2)["input_ids"]
    names = ["first", "__base__"]
    model.train()
    stock = "Cannot pass `adapter_names` when the model is in training mode"
    with pytest.raises(ValueError, match=stock + r"\.$"):
        model(inputs, adapter_names=names)
    other, _ = zoo.layer()
    peftkern.accelerate(other)
    with pytest.raises(ValueError, match=stock + r"\.$"):
        model(inputs, adapter_names=names)
    peftkern.accelerate(model.base_model.model.model.layers[0])
    with pytest.raises(ValueError, match=stock + ".*layers.1.self_attn.q_proj is not accelerated"):
        model(inputs, adapter_names=names)
    peftkern.accelerate(model)
    model(inputs, adapter_names=names)
    with pytest.raises(ValueError, match=stock + ".*'velora'.* is a LoRA variant"):
        model(inputs, adapter_names=["first", "velora"])
    with pytest.raises(ValueError, match=r"non-existing adapter.*other"):
        model(inputs, adapter_names=["first", "other"])
    peftkern.restore(model)
    with pytest.raises(ValueError, match=stock + r"\.$"):
        model(inputs, adapter_names=names)
    peftkern.restore(other)


def test_the_class_gets_its_own_functions_back(zoo, monkeypatch):
    monkeypatch.setattr(hf_peft_forward.switch, "marks", weakref.WeakSet())
    hf_peft_forward.uninstall_if_unused()
    tuner = zoo.peft.tuners.lora.model.LoraModel
    stock = tuner._enable_peft_forward_hooks
    model, _ = zoo.layer()
    peftkern.accelerate(model)
    assert tuner._enable_peft_forward_hooks is not stock
    peftkern.restore(model)
    assert tuner._enable_peft_forward_hooks is stock


def test_optimiser_steps_equal_those_of_each_adapter_alone(zoo):
    model = zoo.several("llama")
    inputs = zoo.batch("llama", rows=len(NAMES))["input_ids"]
    models = {adapter: zoo.copy(model) for adapter in ("first", "second", "third")}
    peftkern.accelerate(model)
    step = functools.partial(torch.optim.SGD, lr=0.02)
    optimiser = step([p for n, p in model.named_parameters() if "lora_" in n])
    trained(model)
    for _ in range(3):
        together(zoo, model, inputs)
        optimiser.step()
    for adapter, alone in models.items():
        rows = [i for i, name in enumerate(NAMES) if name == adapter]
        trained(alone, [adapter])
        optimiser = step([p for p in alone.parameters() if p.requires_grad])
        for _ in range(3):
            alone.zero_grad()
            loss(alone(inputs[rows]).logits, rows).backward()
            optimiser.step()
        expected = dict(alone.named_parameters())
        for name, p in model.named_parameters():
            if f".{adapter}." in name:
                torch.testing.assert_close(p, expected[name], rtol=1e-4, atol=1e-5)

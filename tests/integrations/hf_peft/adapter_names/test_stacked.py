"""``adapter_names`` on a PeftMixedModel, whose layers stand around each other: a row takes an adapter of one of them."""

import pytest
import torch

import peftkern
from peftkern.integrations import hf_peft

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")

NAMES = ["lora", "ada", "__base__", "dora", "some", "ada", "lora"]
ADAPTERS = ("lora", "ada", "dora", "some")
pytestmark = pytest.mark.filterwarnings("ignore:.*was reported as accelerated")


def build(zoo, kind, outside="lora", **more):
    """AdaLoRA inside layers of LoRA and DoRA or the other way round, and LoRA without AdaLoRA on one layer."""
    torch.manual_seed(0)
    base, targets = zoo.models[kind]()
    options = {"fan_in_fan_out": kind == "gpt2", "target_modules": targets[:2]}
    configs = {
        "lora": peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **options),
        "ada": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=6, **options),
        "dora": peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False, **options),
        "some": peft.LoraConfig(r=2, init_lora_weights=False, **options | {"target_modules": targets[1:3]}),
        **{name: config(options) for name, config in more.items()},
    }
    order = sorted(configs, key=lambda name: name not in more and (name == "ada") == (outside == "ada"))
    model = peft.get_peft_model(base, configs[order[0]], order[0], mixed=True)
    for name in order[1:]:
        model.add_adapter(name, configs[name])
    model.set_adapter(order)
    for name, p in model.named_parameters():
        if p.requires_grad and "magnitude" not in name:
            p.data = torch.randn(p.shape) * (0.5 if "lora_E" in name else 0.1)
    return model.eval()


def logits(model, inputs):
    """Each sequence by its adapter alone, in PEFT's own code."""
    rows = []
    for row, name in zip(inputs, NAMES, strict=True):
        model.set_adapter([] if name == "__base__" else [name])
        rows.append(model(row[None]).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("outside", ["lora", "ada"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_sequence_is_its_adapter_alone(zoo, apart, fused_mixed, kind, outside):
    model = build(zoo, kind, outside)
    inputs = zoo.batch(kind, rows=len(NAMES))["input_ids"]
    stock, exact = logits(model, inputs), logits(zoo.copy(model).double(), inputs)
    gradients = [apart.gradients(m, inputs, NAMES) for m in (zoo.copy(model), zoo.copy(model).double())]
    model.set_adapter(list(ADAPTERS))
    assert not peftkern.accelerate(model).skipped
    ours = model(inputs, adapter_names=NAMES).logits
    zoo.as_accurate(ours, stock, exact)
    assert len(fused_mixed) == (6 if kind == "llama" else 8), "one call for each layer of the base"
    assert peftkern.status(model).stock == 0

    model.train().zero_grad()
    apart.loss(model(inputs, adapter_names=NAMES).logits, NAMES).backward()
    found, scale = zoo.gradients(model), max(g.abs().max().item() for g in gradients[1].values())
    assert found.keys() == gradients[0].keys() and len(found) > 20
    for name in found:
        assert gradients[1][name].abs().max() > 0
        zoo.as_accurate(found[name], gradients[0][name], gradients[1][name], scale)


def test_generation_is_that_of_each_prompt_alone(zoo, fused_mixed):
    model = build(zoo, "llama")
    inputs = zoo.batch("llama", rows=len(NAMES))["input_ids"]
    options, alone = dict(max_new_tokens=5, do_sample=False, pad_token_id=0), []
    for row, name in zip(inputs, NAMES, strict=True):
        model.set_adapter([] if name == "__base__" else [name])
        alone.append(model.generate(input_ids=row[None], **options)[0])
    peftkern.accelerate(model)
    together = model.generate(input_ids=inputs, adapter_names=NAMES, **options)
    assert len(fused_mixed) >= 5 * 6
    for row, expected in zip(together, alone, strict=True):
        assert torch.equal(row[: len(expected)], expected)


def test_peft_drops_the_names_before_and_after(zoo):
    model = build(zoo, "llama")
    inputs = zoo.batch("llama", rows=len(NAMES))["input_ids"]
    model.set_adapter(["ada"])
    ignored = model(inputs).logits
    assert torch.equal(model(inputs, adapter_names=NAMES).logits, ignored)
    peftkern.accelerate(model)
    assert not torch.allclose(model(inputs, adapter_names=NAMES).logits, ignored)
    peftkern.restore(model)
    assert torch.equal(model(inputs, adapter_names=NAMES).logits, ignored)


def test_layers_that_know_no_names_are_named(zoo):
    model = build(zoo, "llama", loha=lambda options: peft.LoHaConfig(r=2, target_modules=options["target_modules"]))
    inputs = zoo.batch("llama", rows=2)["input_ids"]
    peftkern.accelerate(model)
    for training in (False, True):
        with pytest.raises(ValueError, match="base_layer is a layer of LoHa"):
            model.train(training)(inputs, adapter_names=["lora", "ada"])
    model = build(zoo, "llama")
    peftkern.accelerate(model)
    with pytest.raises(ValueError, match=r"non-existing adapter.*other"):
        model(inputs, adapter_names=["lora", "other"])


def test_levels_that_are_disabled_or_merged(zoo):
    model = build(zoo, "llama")
    peftkern.accelerate(model)
    outer = model.base_model.model.model.layers[0].self_attn.k_proj
    x, names = torch.randn(3, 4, 32), ["lora", "ada", "__base__"]
    whole, base = outer(x, adapter_names=names), outer.get_base_layer()
    outer.enable_adapters(False)
    y = outer(x, adapter_names=names)
    torch.testing.assert_close(y[1:], whole[1:])
    torch.testing.assert_close(y[:1], base(x[:1]))
    outer.enable_adapters(True)
    outer.base_layer.enable_adapters(False)
    with pytest.raises(ValueError, match="its adapters are disabled"):
        outer(x, adapter_names=names)
    outer.base_layer.enable_adapters(True)
    with torch.no_grad():
        outer.base_layer.merge()
    with pytest.raises(ValueError, match="its adapters are merged"):
        outer(x, adapter_names=names)
    assert "its adapters are merged" in hf_peft.why_not(outer, x, names)


def test_one_name_at_two_levels(zoo):
    model = build(zoo, "llama")
    outer = model.base_model.model.model.layers[0].self_attn.q_proj
    outer.base_layer.update_layer("lora", 2, config=peft.AdaLoraConfig(total_step=10), lora_alpha=3)
    peftkern.accelerate(model)
    reason = hf_peft.why_not(outer, torch.randn(2, 3, 32), ["lora", "ada"])
    assert reason == "layers around each other have adapters of the same name"

"""All that PEFT does to a model, done to an accelerated one: always the outcome of stock."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import peftkern


@pytest.fixture
def pair(zoo):
    """(stock, ours): equal models with two adapters, the second one accelerated."""
    stock = zoo.build("llama")
    config = zoo.peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    stock.add_adapter("other", config)
    zoo.randomise(stock)
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    return stock.eval(), ours.eval()


@pytest.fixture
def same(zoo):
    """Assert that two models answer alike, and return the answer."""
    inputs = zoo.batch("llama")

    def check(stock, ours):
        with torch.no_grad():
            expected, actual = stock(**inputs).logits, ours(**inputs).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        return expected

    return check


def test_switching_adapters(zoo, pair, same, fused):
    answers = []
    for choice, calls in (("default", 12), ("other", 4), (["default", "other"], 12), (["other", "default"], 12)):
        for model in pair:
            model.base_model.set_adapter(choice)
        before = len(fused)
        answers.append(same(*pair))
        assert len(fused) - before == calls
    assert not torch.allclose(answers[0], answers[1]) and not torch.allclose(answers[0], answers[2])


def test_disabling_adapters(pair, same, fused):
    stock, ours = pair
    enabled = same(stock, ours)
    with stock.disable_adapter(), ours.disable_adapter():
        before = len(fused)
        disabled = same(stock, ours)
        assert len(fused) == before
    assert not torch.allclose(enabled, disabled)
    assert torch.equal(same(stock, ours), enabled) and len(fused) == 24


def test_merging_and_unmerging(pair, same, fused):
    before = same(*pair)
    for model in pair:
        model.merge_adapter()
    calls = len(fused)
    same(*pair)
    assert len(fused) == calls
    # A merged layer that is disabled unmerges itself.
    with pair[0].disable_adapter(), pair[1].disable_adapter():
        same(*pair)
    assert not any(m.merged for m in pair[1].modules() if hasattr(m, "merged_adapters"))
    torch.testing.assert_close(same(*pair), before, rtol=1e-3, atol=1e-4)
    assert len(fused) == calls + 12


@pytest.mark.parametrize("adapters", [["default"], ["default", "other"]])
def test_merge_and_unload(pair, same, adapters):
    merged = [m.merge_and_unload(safe_merge=True, adapter_names=adapters) for m in pair]
    same(*merged)
    assert not any("lora" in n for n, _ in merged[1].named_modules())
    for (name, a), (other, b) in zip(merged[0].named_parameters(), merged[1].named_parameters()):
        assert name == other and torch.equal(a, b)


def test_unload(pair, same):
    unloaded = [m.unload() for m in pair]
    same(*unloaded)
    assert not any("lora" in n for n, _ in unloaded[1].named_modules())


def test_adapters_added_after_acceleration(zoo, pair, same, fused):
    for model in pair:
        new = zoo.peft.LoraConfig(r=5, target_modules=["q_proj"], init_lora_weights=False, lora_bias=True)
        model.add_adapter("new", new)
        model.set_adapter("new")
        zoo.randomise(model, seed=4)
    same(*pair)
    assert len(fused) == 2  # q_proj was accelerated, so its new adapter is


def test_layers_added_after_acceleration(zoo, pair, same, fused):
    for model in pair:
        new = zoo.peft.LoraConfig(r=5, target_modules=["up_proj"], init_lora_weights=False)
        model.add_adapter("new", new)
        model.set_adapter("new")
        zoo.randomise(model, seed=4)
    same(*pair)
    assert not fused
    report = peftkern.accelerate(pair[1])
    assert [n for n in report.accelerated if n.endswith("up_proj")] == report.accelerated
    others = "it has none of the active adapters ('new'), it has 'default'"
    assert set(report.skipped.values()) == {others, f"{others}, 'other'"}
    same(*pair)
    assert len(fused) == 2


def test_deleting_adapters(pair, same, fused):
    for model in pair:
        model.delete_adapter("default")
        model.set_adapter("other")
    same(*pair)
    assert len(fused) == 4
    for model in pair:
        model.base_model.delete_adapter("other")
    ids = torch.arange(12).reshape(3, 4)
    logits = [model.base_model.model(input_ids=ids).logits for model in pair]
    assert torch.equal(*logits) and len(fused) == 4


def test_renaming_an_adapter(zoo, pair, same, fused):
    # PEFT has no call for it; users move the entries.
    for model in pair:
        for layer in zoo.lora_layers(model).values():
            for attribute in layer.adapter_layer_names + layer.other_param_names:
                entries = getattr(layer, attribute)
                if "default" in entries:
                    entries["renamed"] = entries["default"]
                    del entries["default"]
            layer.set_adapter(["renamed"])
    same(*pair)
    assert len(fused) == 12


def test_weighted_adapters_and_scaling(pair, same, fused):
    answers = [same(*pair)]
    for model in pair:
        model.base_model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "mix", combination_type="cat")
        model.set_adapter("mix")
    answers.append(same(*pair))
    for model in pair:
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(0.25)
    answers.append(same(*pair))
    assert len(fused) == 36 and len({a.sum().item() for a in answers}) == 3


def test_mixed_batch_equals_peft(pair):
    # test_mixed.py has the rest, training included.
    inputs = {"input_ids": torch.arange(12).reshape(3, 4)}
    names = ["default", "__base__", "other"]
    with torch.no_grad():
        expected, actual = (m(**inputs, adapter_names=names).logits for m in pair)
    torch.testing.assert_close(actual, expected)


def test_names_types_and_state_dict_are_untouched(zoo):
    stock = zoo.build("gpt2", lora_dropout=0.1)
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    assert [(n, type(m)) for n, m in stock.named_modules()] == [(n, type(m)) for n, m in ours.named_modules()]
    assert repr(stock) == repr(ours)
    a, b = stock.state_dict(), ours.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    named = dict(stock.named_parameters()), dict(ours.named_parameters())
    assert list(named[0]) == list(named[1])
    assert [p.requires_grad for p in named[0].values()] == [p.requires_grad for p in named[1].values()]
    ours.load_state_dict(zoo.randomise(copy.deepcopy(stock), seed=8).state_dict())


def test_modules_to_save(zoo, fused):
    stock = zoo.build("bert", modules_to_save=["classifier"])
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    theirs, mine = (zoo.loss_and_gradients(m, zoo.batch("bert")) for m in (stock, ours))
    name = "base_model.model.classifier.modules_to_save.default.weight"
    assert len(fused) == 13
    torch.testing.assert_close(mine[2][name], theirs[2][name], rtol=1e-4, atol=1e-6)


def test_checkpoint_of_an_accelerated_model_loads_into_stock(zoo, pair, same, tmp_path):
    stock, ours = pair
    optimiser = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    ours(**zoo.batch("llama")).loss.backward()
    optimiser.step()
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = zoo.peft.PeftModel.from_pretrained(copy.deepcopy(stock).unload(), tmp_path / ".").eval()
    same(loaded, ours)
    # and the other way: into an accelerated model.
    fresh = zoo.build("llama")
    peftkern.accelerate(fresh)
    fresh.load_adapter(str(tmp_path), "loaded")
    fresh.set_adapter("loaded")
    same(loaded, fresh.eval())


def test_deepcopy_is_accelerated(pair, same, fused):
    twin = copy.deepcopy(pair[1])
    same(pair[0], twin)
    assert len(fused) == 12
    peftkern.restore(pair[1])
    same(pair[0], twin)
    assert len(fused) == 24
    peftkern.restore(twin)
    same(pair[0], twin)
    assert len(fused) == 24


def test_shallow_copy(zoo, fused):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    x = torch.randn(3, 24)
    torch.testing.assert_close(copy.copy(layer)(x), layer(x))
    assert len(fused) == 2


def test_pickle_round_trip(pair, same, fused):
    loaded = pickle.loads(pickle.dumps(pair[1]))
    same(pair[0], loaded)
    assert len(fused) == 12
    peftkern.restore(pair[1])
    peftkern.restore(loaded)
    same(pair[0], loaded)
    assert len(fused) == 12


def test_pickle_needs_only_peft(zoo, tmp_path):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    x = torch.randn(3, 24)
    torch.save({"model": model, "x": x, "y": layer(x).detach()}, tmp_path / "model.pt")
    code = (
        "import sys, torch; d = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(d['model'](d['x']), d['y'])\n"
        "assert 'peftkern' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, timeout=120)


def test_torch_save_keeps_shared_storage(zoo):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer))


def test_casting_and_moving_the_model(zoo, fused):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    model.double()
    x = torch.randn(4, 24, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    expected = expected + 3.0 * (x @ layer.lora_A["default"].weight.T) @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), expected)
    model.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    model.to("meta")
    assert layer(x.to("meta", torch.bfloat16)).shape == (4, 20)
    assert len(fused) == 2

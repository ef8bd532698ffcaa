"""LoRA and (IA)^3 of AdapterHub in whole models: accelerated, every output and gradient is the library's own."""

from __future__ import annotations

import copy
import sys

import adapters
import pytest
import torch
from adapters.composition import Average, BatchSplit, Parallel, Stack

import peftkern
from peftkern import settings

from .models import LAYERS, adapted, batch, outcome, same, trained

F64 = torch.float64
EVERYWHERE = {"intermediate_lora": True, "output_lora": True, "attn_matrices": ["q", "k", "v"]}
CONFIGS = {
    "lora": adapters.LoRAConfig(),
    "lora everywhere": adapters.LoRAConfig(r=3, alpha=7, **EVERYWHERE),
    "gated": adapters.LoRAConfig(r=3, use_gating=True),
    "ia3": adapters.IA3Config(),
    "ia3 everywhere": adapters.IA3Config(alpha=3, **EVERYWHERE),
}
STOCK = {
    "dora": (adapters.DoRAConfig(), "is DoRA"),
    "vera": (adapters.VeraConfig(), "is a Vera"),
    "a gated (IA)^3": (adapters.IA3Config(use_gating=True), "with a gate"),
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def small():
    """Small calls of (IA)^3 too, which the library's own code computes faster."""
    with settings.using(small_calls=True):
        yield


def layers(kind, name):
    """How many linear layers this config adapts."""
    attention = 3 if "everywhere" in name else 2
    each = attention + (2 if "everywhere" in name else 1 if name == "ia3" else 0)
    return LAYERS * each


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_models(kind, name):
    model, inputs = adapted(kind, CONFIGS[name]), batch()
    report = same(model, inputs)
    expected = [n for n, m in model.named_modules() if "a" in getattr(m, "loras", ())]
    assert report.accelerated == expected and not report.skipped and len(expected) == layers(kind, name)
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (len(expected), 0)
    peftkern.restore(model)
    assert torch.equal(model(**inputs)[0], copy.deepcopy(model)(**inputs)[0])
    assert peftkern.status(model).fused == 0


def test_conv1d():
    """GPT-2: its feed-forward layers are stored transposed; its packed projections run the library's own code."""
    model = adapted("gpt2", CONFIGS["lora everywhere"])
    report = same(model, batch())
    assert len(report.accelerated) == 2 * LAYERS and all("mlp" in name for name in report.accelerated)
    assert len(report.skipped) == LAYERS and all("LoRAMergedLinear" in reason for reason in report.skipped.values())


@pytest.mark.parametrize("name", ["gated", "ia3"])
def test_small_calls_stay_with_the_library(name):
    model, inputs = adapted("bert", CONFIGS[name]), batch()
    with settings.using(small_calls=False):
        same(model, inputs)
    status = peftkern.status(model)
    assert status.fused == 0 and status.stock and all("too small" in reason for reason in status.reasons.values())


@pytest.mark.parametrize("name", STOCK)
def test_other_adapters_stay_with_the_library(name):
    config, reason = STOCK[name]
    model, inputs = adapted("bert", config), batch()
    expected, report = outcome(model, inputs), peftkern.accelerate(model)
    assert not report.accelerated and all(reason in said for said in report.skipped.values())
    torch.testing.assert_close(outcome(model, inputs), expected, rtol=0, atol=0)


SETUPS = {
    "stack of another": (lambda: Stack("b", "a"), "of several active adapters"),
    "batch split": (lambda: BatchSplit("a", "b", batch_sizes=[2, 1]), "composed"),
    "parallel": (lambda: Parallel("a", "b"), "composed"),
    "average": (lambda: Average("a", "b", weights=[0.3, 0.7]), "composed"),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_compositions_stay_with_the_library(setup):
    make, reason = SETUPS[setup]
    config = adapters.LoRAConfig(r=3, attn_matrices=["q"])
    model, inputs = adapted("bert", config, config), batch()
    model.set_active_adapters(make())
    expected = model(**inputs)[0]
    report = peftkern.accelerate(model)
    assert len(report.skipped) == LAYERS and all(reason in said for said in report.skipped.values())
    assert torch.equal(model(**inputs)[0], expected)
    model.set_active_adapters("a")
    theirs = copy.deepcopy(model)
    peftkern.restore(theirs)
    torch.testing.assert_close(model(**inputs)[0], theirs(**inputs)[0], rtol=1e-9, atol=1e-9)
    assert peftkern.status(model).fused == LAYERS


def test_a_stack_in_which_a_layer_has_one():
    """LoRA beside ReFT, and beside LoRA of other layers."""
    q, v = (adapters.LoRAConfig(r=3, attn_matrices=[m]) for m in "qv")
    model = adapted("bert", q, v, adapters.LoReftConfig(r=2, dropout=0.0))
    model.train_adapter(Stack("a", "b", "c"))
    model.set_active_adapters(Stack("c", "a", "b"))
    report = same(model, batch())
    assert len(report.accelerated) == 3 * LAYERS and peftkern.status(model).stock == 0


def test_states(caplog):
    model, inputs = adapted("bert", CONFIGS["lora"], train=False), batch()
    with torch.no_grad():
        expected = model(**inputs)[0]
        peftkern.accelerate(model)
        model.merge_adapter("a")
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-9, atol=1e-9)
        assert all("merged" in reason for reason in peftkern.status(model, reset=True).reasons.values())
        model.reset_adapter()
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-9, atol=1e-9)
        status = peftkern.status(model, reset=True)
        assert (status.fused, status.stock) == (2 * LAYERS, 0)
        model.set_active_adapters(None)
        assert not torch.allclose(model(**inputs)[0], expected)
        status = peftkern.status(model, reset=True)
        assert status.fused == 0 and all(r.startswith("it has no active adapter") for r in status.reasons.values())
        with adapters.AdapterSetup("a"):
            torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-9, atol=1e-9)
        assert peftkern.status(model).fused == 2 * LAYERS


def test_a_base_that_trains_stays_with_the_library():
    model, inputs = adapted("bert", CONFIGS["lora"]), batch()
    model.freeze_model(False)
    expected, report = outcome(model, inputs), peftkern.accelerate(model)
    assert set(report.skipped.values()) == {"the base weight requires grad"}
    torch.testing.assert_close(outcome(model, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("gated", [False, True])
def test_dropout_by_a_shared_mask(gated, shared_mask, monkeypatch):
    for name in ("autograd.lora_linear", "methods.linear"):
        module = sys.modules[f"peftkern.{name}"]
        monkeypatch.setattr(module, "seed_tensor", lambda seed, device: torch.tensor(shared_mask))
    model = adapted("bert", adapters.LoRAConfig(r=3, dropout=0.3, use_gating=gated))
    same(model, batch())
    assert peftkern.status(model).stock == 0


def test_gating_scores_are_told():
    model, inputs = adapted("bert", CONFIGS["gated"], train=False), batch()

    def scores():
        return model(**inputs, output_adapter_gating_scores=True)["adapter_gating_scores"]

    with torch.no_grad():
        expected = scores()
        peftkern.accelerate(model)
        found = scores()
    assert peftkern.status(model).stock == 0 and expected["a"].keys() == found["a"].keys()
    for layer, places in expected["a"].items():
        for place, values in places.items():
            torch.testing.assert_close(torch.tensor(found["a"][layer][place]), torch.tensor(values))


def test_training_and_checkpoints(tmp_path):
    stock = adapted("bert", adapters.ConfigUnion(CONFIGS["lora everywhere"], adapters.LoReftConfig(r=2, dropout=0.0)))
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    losses = [trained(model, torch.optim.SGD, lr=0.02) for model in (stock, ours)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-9, atol=0.0)
    assert losses[0][-1] != losses[0][0] and peftkern.status(ours).stock == 0
    theirs, mine = stock.state_dict(), ours.state_dict()
    assert theirs.keys() == mine.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-9)
    ours.save_adapter(str(tmp_path), "a")
    again = adapted("bert", CONFIGS["ia3"])
    again.load_state_dict({k: v for k, v in ours.state_dict().items() if ".a." not in k}, strict=False)
    again.load_adapter(str(tmp_path), load_as="b", set_active=True)
    for model in (again, ours):
        model.eval()
    inputs = batch()
    torch.testing.assert_close(again(**inputs)[0], ours(**inputs)[0])


@pytest.mark.parametrize("name", ["mam", "unipelt"])
def test_unions(name):
    """Bottleneck or LoRA beside prefixes, which stay as they are."""
    model, inputs = adapted("bert", name), batch()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    report = same(model, inputs)
    assert all("prefix" in n for n in report.skipped) and report.skipped and report.accelerated
    status = peftkern.status(model)
    assert status.fused == len(report.accelerated)


def test_prefix_tuning_is_untouched():
    model, inputs = adapted("bert", adapters.PrefixTuningConfig(dropout=0.0)), batch()
    expected, report = outcome(model, inputs), peftkern.accelerate(model)
    assert not report.accelerated and report.skipped
    torch.testing.assert_close(outcome(model, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lora everywhere", "ia3"])
def test_dtypes(name):
    """fp32 and bf16 models, each by the error in fp64; autocast, of which (IA)^3 stays with the library."""
    model, inputs = adapted("bert", CONFIGS[name], train=False), batch()
    with torch.no_grad():
        exact = model(**inputs)[0]
        for dtype in (torch.float32, torch.bfloat16):
            other = copy.deepcopy(model).to(dtype)
            worst = [(other(**inputs)[0].double() - exact).abs().mean()]
            peftkern.accelerate(other)
            worst.append((other(**inputs)[0].double() - exact).abs().mean())
            assert peftkern.status(other).stock == 0 and worst[1] <= 1.5 * worst[0]
        other, worst = copy.deepcopy(model).float(), []
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = other(**inputs)[0]
            worst.append((y.double() - exact).abs().mean())
            peftkern.accelerate(other)
        fused = sum(peftkern.status(m).fused for m in other.modules() if len(getattr(m, "loras", ())))
        assert worst[1] <= 1.5 * worst[0] and (fused > 0) == (name != "ia3")

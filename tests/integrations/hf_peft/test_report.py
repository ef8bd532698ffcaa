"""What accelerate says of a model is what runs: back ends, layer sets, experts, device hooks, models without layers."""

import itertools
import warnings
import weakref

import pytest
import torch
from torch import nn

import peftkern
from peftkern.dispatch.choose import load
from peftkern.integrations import hf_peft
from peftkern.integrations.hf_peft import forward as hf_peft_forward
from peftkern.settings import using

NAME = "base_model.model.0"


def test_the_back_end_of_each_layer_is_named(zoo, monkeypatch):
    model = zoo.build("llama")
    inner = model.base_model.model.model.layers[0]
    for layer in (inner.self_attn.q_proj, inner.mlp.down_proj):
        layer.double()
    report = peftkern.accelerate(model)
    assert list(report.backends) == report.accelerated
    groups = [list(report.backends.values()).count(name) for name in ("cpu", "reference")]
    assert groups == [10, 2] and report.backends[report.accelerated[0]] == "reference"
    lines = str(report).splitlines()
    assert "  10 run fused, back end cpu" in lines and "   2 run fused, back end reference" in lines
    for setting, named in (("reference", "reference"), ("cuda", "none (PEFTKERN_BACKEND=cuda cannot take")):
        monkeypatch.setenv("PEFTKERN_BACKEND", setting)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it was asked for
            assert peftkern.accelerate(model).backends[report.accelerated[1]].startswith(named)


def test_a_back_end_may_compute_the_forward_alone(zoo, monkeypatch):
    cpu = load("cpu")
    monkeypatch.setattr(cpu, "decline", lambda problem, now: "not this" if problem.op.endswith("_bwd") else None)
    model, _ = zoo.layer()
    with using(gpu="of this test"):  # nobody has decided anything under these settings
        assert peftkern.accelerate(model).backends == {NAME: "cpu, backward reference"}


def test_only_the_reference_left_is_warned_of(zoo, monkeypatch):
    model, _ = zoo.layer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftkern.accelerate(model)
    monkeypatch.setattr("peftkern.backends.cpu.native._C", None)
    with pytest.warns(RuntimeWarning, match="reference computes .*C\\+\\+ extension is not built.*peftkern doctor"):
        with using(gpu="of that test"):
            report = peftkern.accelerate(model)
    assert report.backends == {NAME: "reference"} and "back end reference" in str(report)


@pytest.fixture
def apart(zoo):
    """A model whose adapter a is on q_proj and v_proj and b on v_proj alone; both active unless a test says otherwise."""
    model = zoo.several("llama", a={"target_modules": ["q_proj", "v_proj"]}, b={"target_modules": ["v_proj"]})
    peftkern.accelerate(model)
    attention = model.base_model.model.model.layers[0].self_attn
    return model, attention.q_proj, attention.v_proj


def test_an_adapter_of_other_layers_is_told_from_none(zoo, apart):
    model, q, v = apart
    reasons = {
        ("a",): None,
        ("b",): "it has none of the active adapters ('b'), it has 'a'",
        ("a", "b"): None,
        ("b", "c"): "it has none of the active adapters ('b', 'c'), it has 'a'",
        (): "it has no active adapter",
    }
    for active, reason in reasons.items():
        q._active_adapter = v._active_adapter = list(active)
        assert hf_peft.why_not(q) == hf_peft.why_not(q, torch.randn(2, 32)) == reason
        assert hf_peft.why_not(v) is None or not active
        skipped = peftkern.accelerate(model.base_model.model.model.layers[0]).skipped
        assert skipped.get("self_attn.q_proj") == reason
    model.delete_adapter("a")
    model.base_model.set_adapter("b")
    assert hf_peft.why_not(q) == "it has no adapter" and hf_peft.why_not(v) is None


def test_why_not_of_a_mixed_batch_is_what_its_call_does(zoo, apart):
    model, q, v = apart
    x = torch.randn(2, 3, 32)
    for layer, names in itertools.product((q, v), itertools.product(("a", "b", "__base__"), repeat=2)):
        names = list(names)
        reason = hf_peft.why_not(layer, x, names)
        peftkern.status(model, reset=True)
        y = layer(x, adapter_names=names)
        status = peftkern.status(model)
        assert (status.fused, status.stock) == ((1, 0) if reason is None else (0, 1))
        assert list(status.reasons.values()) == ([] if reason is None else [reason])
        if layer is q and "a" not in names:
            asked = "" if "b" not in names else "it has none of the batch's adapters ('b'), it has 'a'"
            assert reason == asked or (not asked and reason == "it has no adapter of the batch")
        else:
            assert (reason is None) == (set(names) != {"__base__"})
        peftkern.restore(layer)
        torch.testing.assert_close(y, layer(x, adapter_names=names), rtol=1e-5, atol=1e-5)
        peftkern.accelerate(layer)


def test_expert_parameters_are_one_layer(zoo):
    config = zoo.transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    settings = zoo.peft.LoraConfig(
        target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    model = zoo.peft.get_peft_model(zoo.transformers.MixtralForCausalLM(config), settings)
    report = peftkern.accelerate(model)
    names = [f"base_model.model.model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert len(report.accelerated) == 4 and not report.skipped and report.accelerated[1::2] == names
    assert len(set(report.backends.values())) == 1 and "none" not in report.backends[names[0]]
    assert str(report).startswith("peftkern: 4 of 4 PEFT layers accelerated")
    assert hf_peft.why_not(model.get_submodule(names[0])) is None
    model(torch.ones(1, 3, dtype=torch.long))
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (4, 0) and not status.reasons


def test_parameters_of_other_modules_are_one_layer(zoo):
    made = nn.Sequential(nn.Module(), nn.Linear(8, 8))
    made[0].up, made[0].down = (nn.Parameter(torch.randn(3, 8, 8)) for _ in range(2))
    model = zoo.peft.get_peft_model(
        made, zoo.peft.LoraConfig(target_modules=["1"], target_parameters=["0.up", "0.down"])
    )
    report = peftkern.accelerate(model)
    name, reason = next(iter(report.skipped.items()))
    assert len(report.accelerated) == len(report.skipped) == 1 and name == "base_model.model.0"
    assert "target_parameters" in reason and "up" in reason and "down" in reason
    assert hf_peft.why_not(model.get_submodule(name)) == reason and peftkern.status(model).reasons == report.skipped


class Foreign(nn.Linear):
    """Stands for a layer of another library."""


NOTHING = {
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "p tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
}


@pytest.mark.parametrize("method", NOTHING)
def test_methods_without_layers_are_named(zoo, method):
    config, options = NOTHING[method]
    base, _ = zoo.models["llama"]()
    model = zoo.peft.get_peft_model(base, getattr(zoo.peft, config)(task_type="CAUSAL_LM", **options))
    text = str(peftkern.accelerate(nn.Sequential(model)))
    assert text.startswith("peftkern: the model has no PEFT layer: its adapter 'default' is " + method)


def test_other_libraries_are_named(monkeypatch):
    libraries = {
        "pyreft.interventions": "pyreft (pyreft.interventions.Foreign)",
        "loralib.layers": "loralib (loralib.layers.Foreign)",
    }
    for module, said in libraries.items():
        monkeypatch.setattr(Foreign, "__module__", module)
        report = peftkern.accelerate(nn.Sequential(nn.ReLU(), Foreign(2, 2)))
        assert said in report.note and str(report) == f"peftkern: the model has no PEFT layer: {report.note}"
    assert "LoRALinear" in peftkern.accelerate(nn.Sequential(peftkern.LoRALinear(4, 4))).note
    assert str(peftkern.accelerate(nn.Linear(2, 2))) == "peftkern: the model has no PEFT layer"


def _dispatch(model, offload=False):
    accelerate = pytest.importorskip("accelerate", reason="Hugging Face's accelerate is not installed")
    if offload:
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("order", ["base, adapters, accelerate", "adapters, accelerate, all", "offloaded base"])
def test_device_map_hooks(zoo, order):
    base = nn.Sequential(nn.Linear(24, 20))
    if order != "adapters, accelerate, all":
        base = _dispatch(base, offload=order == "offloaded base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT: the offloaded base is on the meta device
        model = zoo.peft.get_peft_model(base, zoo.peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    layer = model.base_model.model[0]
    x = torch.randn(3, 24)
    if order == "offloaded base":
        layer.lora_A.to_empty(device="cpu"), layer.lora_B.to_empty(device="cpu")
        zoo.randomise(model)
    expected = layer(x)
    report = peftkern.accelerate(model)
    if order == "adapters, accelerate, all":
        model = _dispatch(model)
    torch.testing.assert_close(model(x), expected)
    status = peftkern.status(model)
    if order == "offloaded base":
        assert "forward of base_layer was replaced" in report.skipped[NAME]
        assert (status.fused, status.stock) == (0, 1) and status.reasons == report.skipped
    else:
        assert report.accelerated == [NAME] and (status.fused, status.stock) == (1, 0)
        assert hf_peft.why_not(model.base_model.model[0], x) is None


def test_a_model_dispatched_with_its_adapters_before(zoo, monkeypatch):
    # The hooks keep the forward that PEFT's class had when they were made: here no other model is accelerated.
    monkeypatch.setattr(hf_peft_forward.switch, "marks", weakref.WeakSet())
    hf_peft_forward.uninstall_if_unused()
    model, _ = zoo.layer()
    model = _dispatch(model)
    report = peftkern.accelerate(model)
    assert report.skipped == {NAME: "its forward was replaced on the instance"}
    model(torch.randn(3, 24))
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (0, 0) and status.reasons == report.skipped

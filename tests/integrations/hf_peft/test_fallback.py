"""What is not covered runs PEFT's own code, with the same result bit for bit, and its reason can be looked up."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

import peftkern
from peftkern.integrations import hf_peft
from peftkern.integrations.hf_peft import forward as hf_peft_forward
from peftkern.integrations.hf_peft import guard as hf_peft_guard


def runs_stock(zoo, model, layer, fused, reason, x=None):
    """Assert: accelerated or not, the call gives the same bits, nothing runs fused, and the report says why."""
    x = torch.randn(5, 24) if x is None else x
    peftkern.restore(model)
    torch.manual_seed(2)
    expected = layer(x)
    report = peftkern.accelerate(model)
    torch.manual_seed(2)
    assert torch.equal(layer(x), expected) and not fused
    assert reason in report.skipped["base_model.model.0"], report
    assert reason in hf_peft.why_not(layer) and reason in hf_peft.why_not(layer, x)
    assert not report.accelerated and reason in peftkern.status(model).reasons["base_model.model.0"]


class Custom(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2.0


class Doubled(nn.Module):
    def forward(self, w):
        return 2.0 * w


def _subclass(zoo):
    model = zoo.peft.get_peft_model(nn.Sequential(Custom(24, 20)), zoo.peft.LoraConfig(target_modules=["0"]))
    return zoo.randomise(model), model.base_model.model[0]


def _velora(zoo):
    return zoo.layer(velora_config=zoo.peft.VeloraConfig(num_groups=4))


def _lora_subclass(zoo):
    model, layer = zoo.layer()
    layer.__class__ = type("Mine", (type(layer),), {})
    return model, layer


def _changed(change):
    def make(zoo):
        model, layer = zoo.layer(lora_dropout=0.5)
        change(layer)
        return model, layer

    return make


CASES = {
    "subclass of nn.Linear": (_subclass, "base_layer is a"),
    "subclass of lora.Linear": (_lora_subclass, "layer type"),
    "VeLoRA": (_velora, "Velora"),
    "forward hook on base_layer": (
        _changed(lambda m: m.base_layer.register_forward_hook(lambda *a: a[-1] + 1)),
        "base_layer carries a hook",
    ),
    "pre-hook on lora_A": (
        _changed(lambda m: m.lora_A["default"].register_forward_pre_hook(lambda m, a: (a[0] * 2,))),
        "lora_A carries a hook",
    ),
    "backward hook on lora_B": (
        _changed(lambda m: m.lora_B["default"].register_full_backward_hook(lambda *a: None)),
        "lora_B carries a hook",
    ),
    "backward pre-hook on dropout": (
        _changed(lambda m: m.lora_dropout["default"].register_full_backward_pre_hook(lambda *a: None)),
        "lora_dropout carries a hook",
    ),
    "forward replaced on base_layer": (
        _changed(lambda m: setattr(m.base_layer, "forward", lambda x: nn.functional.linear(x, m.base_layer.weight))),
        "forward of base_layer was replaced",
    ),
    "forward replaced on the layer": (
        _changed(lambda m: setattr(m, "forward", m.base_layer.forward)),
        "its forward was replaced",
    ),
    "parametrised base": (
        _changed(lambda m: parametrize.register_parametrization(m.base_layer, "weight", Doubled())),
        "base_layer is a",
    ),
    "parametrised lora_A": (
        _changed(lambda m: parametrize.register_parametrization(m.lora_A["default"], "weight", Doubled())),
        "lora_A is a",
    ),
    "other dropout": (
        _changed(lambda m: m.lora_dropout.update({"default": nn.AlphaDropout(0.5)})),
        "lora_dropout is a",
    ),
    "dropout of everything": (
        _changed(lambda m: m.lora_dropout.update({"default": nn.Dropout(1.0)})),
        "drops everything",
    ),
    "weight that requires grad": (
        _changed(lambda m: m.base_layer.weight.requires_grad_(True)),
        "requires grad",
    ),
    "bias on lora_A": (
        _changed(lambda m: m.lora_A.update({"default": nn.Linear(24, 4)})),
        "lora_A of 'default' has a bias",
    ),
    "scaling per output": (
        _changed(lambda m: m.scaling.update(default=torch.ones(20))),
        "scaling of 'default'",
    ),
    "adapter narrower than the base": (
        _changed(lambda m: (m.lora_A.bfloat16(), m.lora_B.bfloat16())),
        "adapter 'default' is torch.bfloat16, the input is torch.float32",
    ),
    "disabled": (_changed(lambda m: m.enable_adapters(False)), "disabled"),
    "merged": (_changed(lambda m: m.merge()), "merged"),
    "no active adapter": (_changed(lambda m: m.set_adapter([])), "no active adapter"),
}


@pytest.mark.parametrize("case", CASES)
def test_not_covered(zoo, fused, case):
    make, reason = CASES[case]
    runs_stock(zoo, *make(zoo), fused, reason)


def test_weight_that_requires_grad_trains(zoo):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    layer.base_layer.weight.requires_grad_(True)
    layer(torch.randn(3, 24)).sum().backward()
    assert layer.base_layer.weight.grad.abs().sum() > 0


def test_a_hook_is_seen_at_the_next_call_and_so_is_its_end(zoo, fused):
    model, layer = zoo.layer()
    assert peftkern.accelerate(model).accelerated
    x = torch.randn(3, 24)
    layer(x)
    seen = []
    handle = layer.lora_A["default"].register_forward_hook(lambda m, a, y: seen.append(y.shape))
    layer(x)
    assert len(fused) == 1 and seen == [(3, 4)]
    handle.remove()
    layer(x)
    assert len(fused) == 2


def test_hooks_on_the_layer_itself_run(zoo, fused):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    seen = []
    layer.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    layer.register_forward_hook(lambda m, a, y: seen.append("post"))
    layer.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    layer(torch.randn(3, 24, requires_grad=True)).sum().backward()
    assert seen == ["pre", "post", "backward"] and len(fused) == 1


def test_global_hooks_see_every_part(zoo, fused):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    seen = []
    handle = nn_module.register_module_forward_hook(lambda m, a, y: seen.append(m))
    try:
        layer(torch.randn(3, 24))
        assert "global" in hf_peft.why_not(layer)
    finally:
        handle.remove()
    assert layer.base_layer in seen and layer.lora_B["default"] in seen and not fused


def test_parameter_hooks_run(zoo, fused):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    seen = []
    layer.lora_A["default"].weight.register_hook(lambda g: seen.append(g.shape))
    layer.lora_B["default"].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.shape))
    layer(torch.randn(3, 24)).sum().backward()
    assert sorted(seen) == [(4, 24), (20, 4)] and len(fused) == 1


class Tagged(torch.Tensor):
    """A tensor subclass that counts the functions it meets."""

    met = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Tagged.met += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("part", ["input", "base weight", "lora_B"])
def test_tensor_subclasses_meet_peft(zoo, fused, part):
    model, layer = zoo.layer()
    x = torch.randn(3, 24)
    if part == "input":
        x = x.as_subclass(Tagged)
    elif part == "base weight":
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().as_subclass(Tagged), False)
    else:
        layer.lora_B["default"].weight = nn.Parameter(layer.lora_B["default"].weight.detach().as_subclass(Tagged))
    peftkern.accelerate(model)
    met = Tagged.met
    layer(x)
    assert Tagged.met > met and not fused and hf_peft.why_not(layer, x)


def test_functional_transforms_forward_mode_tracing_and_export(zoo, fused):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    x = torch.randn(3, 24)
    expected = layer(x)
    fused.clear()
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
    jacobian = torch.func.jacrev(lambda t: layer(t).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close(tangent.sum(), jacobian.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.jit.trace(layer, (x,), check_trace=False)(x), expected)
    graph = make_fx(layer)(x)
    graph(x).sum().backward()
    assert "peftkern" not in str(graph.graph) and layer.lora_A["default"].weight.grad is not None
    program = torch.export.export(layer, (x,))
    assert "peftkern" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), expected)
    assert not fused


BAD_INPUT = {
    "columns": torch.ones(3, 23),
    "no dimension": torch.ones(()),
    "integers": torch.ones(3, 24, dtype=torch.int64),
    "nothing": None,
}


@pytest.mark.parametrize("x", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_raises_what_stock_raises(zoo, x):
    model, layer = zoo.layer()
    errors = []
    for accelerated in (False, True):
        if accelerated:
            peftkern.accelerate(model)
        with pytest.raises(Exception) as caught:
            layer(x)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def test_other_layers_are_listed_and_left_alone(zoo, fused):
    config = zoo.peft.LoraConfig(target_modules=["0"])
    report = peftkern.accelerate(zoo.peft.get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), config))
    assert not report.accelerated
    assert report.skipped["base_model.model.0"].endswith(
        "MultiheadAttention is not covered: its adapters are merged into packed projections for each call"
    )
    loha = zoo.peft.LoHaConfig(target_modules=["0"])
    report = peftkern.accelerate(zoo.peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), loha).bfloat16())
    assert not report.accelerated and "in half precision" in report.skipped["base_model.model.0"]


def test_a_plain_adapter_beside_a_variant(zoo, fused):
    model, layer = zoo.layer()
    velora = zoo.peft.VeloraConfig(num_groups=4)
    model.add_adapter("velora", zoo.peft.LoraConfig(target_modules=["0"], velora_config=velora))
    zoo.randomise(model)
    assert peftkern.accelerate(model).accelerated
    x = torch.randn(3, 24)
    layer(x)
    model.base_model.set_adapter(["default", "velora"])
    assert "'velora' is a LoRA variant" in hf_peft.why_not(layer)
    layer(x)
    assert len(fused) == 1


@pytest.mark.parametrize("version", ["0.17.1", "0.22.0", "0.22.0.dev0", "1.0", "strange"])
def test_other_versions_of_peft_are_skipped(zoo, fused, monkeypatch, version):
    model, layer = zoo.layer()
    monkeypatch.setattr(zoo.peft, "__version__", version)
    forward = type(layer).forward
    report = peftkern.accelerate(model)
    assert version in report.skipped["base_model.model.0"] and not report.accelerated
    assert type(layer).forward is forward
    with pytest.warns(RuntimeWarning, match=version):
        hf_peft.patch()
    layer(torch.randn(3, 24))
    assert type(layer).forward is forward and not fused


def test_the_installed_version_is_in_the_tested_range(zoo):
    assert hf_peft_guard.version_reason("peft", zoo.peft.__version__) is None


def test_a_method_knows_other_releases_than_its_layer(zoo, monkeypatch):
    model, layer = zoo.layer(use_dora=True)
    peftkern.accelerate(model)
    assert hf_peft.why_not(layer) is None
    monkeypatch.setattr(zoo.peft, "__version__", "0.18.1")
    assert hf_peft.why_not(layer) == "DoRA: PEFT 0.18.1 is outside the tested range 0.21 to 0.21"
    assert hf_peft.why_not(zoo.layer()[1]) == "it is not accelerated: call accelerate or patch"


def test_a_forward_that_another_library_replaced_is_left_alone(zoo, fused, monkeypatch):
    model, layer = zoo.layer()

    def other(self, x, *args, **kwargs):
        return "theirs"

    monkeypatch.setattr(type(layer), "forward", other)
    report = peftkern.accelerate(model)
    assert "was replaced by" in report.skipped["base_model.model.0"]
    assert layer(torch.randn(3, 24)) == "theirs" and not fused
    monkeypatch.undo()
    # Theirs on top of ours: restore takes back only what is ours.
    peftkern.accelerate(model)
    ours = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x: ("theirs", ours(self, x)))
    peftkern.restore(model)
    assert layer(torch.randn(3, 24))[0] == "theirs" and not fused
    monkeypatch.undo()
    hf_peft_forward.uninstall_if_unused()

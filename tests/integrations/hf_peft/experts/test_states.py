"""Adapted experts through the states that PEFT knows, what is left to PEFT's own code, and how it all ends."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peftkern
from peftkern.integrations import hf_peft


def _counted(model, *given):
    peftkern.status(model, reset=True)
    with torch.no_grad():
        y = model(*given)
    status = peftkern.status(model)
    return y, (status.fused, status.stock), "".join(status.reasons.values())


@pytest.fixture
def pair(moe):
    """Ours, PEFT's, and the arguments of a call."""
    stock = moe.both(dtype=torch.float64)
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    return ours, stock, moe.call(dtype=torch.float64)


def test_merged_and_unmerged(pair):
    ours, stock, given = pair
    wanted = stock(*given)
    for model in pair[:2]:
        model.merge_adapter()
    y, calls, reason = _counted(ours, *given)
    assert calls == (0, 1) and reason == "its adapters are merged into the base weight"
    torch.testing.assert_close(y, stock(*given))
    torch.testing.assert_close(y, wanted)
    ours.unmerge_adapter()
    y, calls, _ = _counted(ours, *given)
    assert calls == (1, 0)
    torch.testing.assert_close(y, wanted)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(*given), wanted)


def test_disabled(pair):
    ours, stock, given = pair
    with ours.disable_adapter(), stock.disable_adapter():
        y, calls, reason = _counted(ours, *given)
        assert calls == (0, 1) and reason == "its adapters are disabled"
        torch.testing.assert_close(y, stock(*given), rtol=0, atol=0)
    assert _counted(ours, *given)[1] == (1, 0)


def test_no_active_adapter(pair):
    ours, stock, given = pair
    for model in (ours, stock):
        for layer in hf_peft.experts.wrappers(model.base_model.model.experts):
            layer._active_adapter = []
    y, calls, reason = _counted(ours, *given)
    assert calls == (0, 1) and reason == "it has no active adapter"
    torch.testing.assert_close(y, stock(*given), rtol=0, atol=0)


def test_saved_and_loaded(moe, pair, tmp_path):
    ours, stock, given = pair
    assert ours.state_dict().keys() == stock.state_dict().keys()
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    fresh = moe.both(dtype=torch.float64)
    fresh.base_model.model.experts.get_base_layer().load_state_dict(
        ours.base_model.model.experts.get_base_layer().state_dict()
    )
    peftkern.accelerate(fresh)
    fresh.load_adapter(tmp_path, "loaded")
    fresh.set_adapter("loaded")
    y, calls, _ = _counted(fresh, *given)
    assert calls == (1, 0)
    torch.testing.assert_close(y, stock(*given))


def test_restored(pair):
    ours, stock, given = pair
    peftkern.restore(ours)
    assert hf_peft.why_not(ours.base_model.model.experts).startswith("it is not accelerated")
    assert ours.base_model.model.experts.__dict__.keys() == stock.base_model.model.experts.__dict__.keys()
    y, calls, _ = _counted(ours, *given)
    assert calls == (0, 0)
    torch.testing.assert_close(y, stock(*given), rtol=0, atol=0)


def test_patched(moe):
    model, given = moe.both(), moe.call()
    hf_peft.patch()
    try:
        assert _counted(model, *given)[1] == (1, 0)
        peftkern.restore(model)
        assert _counted(model, *given)[1] == (0, 0)
    finally:
        hf_peft.unpatch()


def test_compiled(pair):
    # The graph breaks around the experts, whose rows the host counts.
    ours, stock, given = pair
    torch._dynamo.reset()
    y, calls, _ = _counted(torch.compile(ours, backend="aot_eager"), *given)
    assert calls == (1, 0)
    torch.testing.assert_close(y, stock(*given))


def test_checkpointed(moe, pair):
    ours, stock, given = pair
    grad = torch.randn_like(given[0])

    def recomputed(x, index, weights):
        return torch.utils.checkpoint.checkpoint(ours, x, index, weights, use_reentrant=False)

    recomputed.zero_grad, recomputed.named_parameters = ours.zero_grad, ours.named_parameters
    torch.testing.assert_close(moe.step(recomputed, *given, grad), moe.step(stock, *given, grad))


def _hook(*_):
    return None


def _trained(experts):
    experts.get_base_layer().down_proj.requires_grad_(True)


def _spread(experts):
    experts.get_base_layer()._is_expert_parallel = True


def _other(experts):
    experts.get_base_layer().config._experts_implementation = "sonicmoe"


def _replaced(experts):
    base = experts.get_base_layer()
    base.forward = base.forward


def _narrow(experts):
    experts.lora_A["default"].to(torch.bfloat16)


CHANGES = {
    "hook": (lambda e: e.get_base_layer().register_forward_hook(_hook), "base_layer carries a hook"),
    "hook inside": (lambda e: e.base_layer.register_forward_pre_hook(_hook), "base_layer carries a hook"),
    "trained": (_trained, "down_proj requires grad"),
    "spread": (_spread, "its experts are spread over devices"),
    "other implementation": (_other, "its experts implementation is 'sonicmoe'"),
    "replaced": (_replaced, "the forward of base_layer was replaced on the instance"),
    "half adapter": (_narrow, "lora_A and lora_B of 'default' differ in dtype"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_left_to_peft(pair, change):
    ours, _, _ = pair
    experts = ours.base_model.model.experts
    alter, reason = CHANGES[change]
    alter(experts)
    assert hf_peft.why_not(experts) == reason
    assert peftkern.accelerate(ours).skipped == {"base_model.model.experts": reason}


def test_calls_left_to_peft(moe, pair):
    ours, stock, (x, index, weights) = pair
    experts, plain = (model.base_model.model.experts for model in (ours, stock))
    with pytest.warns(RuntimeWarning, match="arguments of its own"):
        y = experts(x, top_k_index=index, top_k_weights=weights)
    torch.testing.assert_close(y, plain(x, index, weights), rtol=0, atol=0)
    with pytest.warns(RuntimeWarning, match="the input is torch.float32"), pytest.raises(RuntimeError, match="dtype"):
        experts(x.float(), index, weights)
    assert peftkern.status(ours).stock == 2


@pytest.mark.parametrize("target", ["both", "down_proj"])
def test_autocast_that_grouped_mm_does_not_know(moe, target):
    """It computes in the dtype of its weights, and so does PEFT's sum of a weight and its adapter: nothing is rounded."""
    stock = moe.both("gate", "grouped_mm") if target == "both" else moe.adapted(moe.block("gate", "grouped_mm"), target)
    ours, given = copy.deepcopy(stock), moe.call(40)
    peftkern.accelerate(ours)
    grad = torch.randn_like(given[0])

    def within(model):
        def call(*given):
            with torch.autocast("cpu", torch.bfloat16):
                return model(*given)

        call.zero_grad, call.named_parameters = model.zero_grad, model.named_parameters
        return call

    got, wanted = (moe.step(within(model), *given, grad) for model in (ours, stock))
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
    assert (peftkern.status(ours).fused, peftkern.status(ours).stock) == (1, 0)


class Other(nn.Module):
    """Experts of a library that nobody here knows."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.down_proj = nn.Parameter(torch.randn(3, 8, 8))


def test_a_module_whose_own_code_is_wider(moe):
    (reason,) = peftkern.accelerate(moe.both("wide")).skipped.values()
    assert reason == "its own code computes in fp32, whatever its parameters are"
    assert peftkern.accelerate(moe.both("wide", "grouped_mm")).accelerated


def test_modules_that_are_no_experts_of_transformers(moe):
    for made, target in ((Other(), "down_proj"), (moe.block("transposed, bias, interleaved"), "down_proj_bias")):
        report = peftkern.accelerate(moe.adapted(made, target))
        (reason,) = report.skipped.values()
        assert target in reason and not report.accelerated


def test_releases(moe, monkeypatch):
    model = moe.both()
    for library, (_, known) in hf_peft.experts.TESTED.items():
        monkeypatch.setitem(hf_peft.experts.TESTED, library, ("99.1.0", known))
        (reason,) = peftkern.accelerate(model).skipped.values()
        assert reason == f"experts are covered with {library} {known[0]}.{known[1]}, this is 99.1.0"
        monkeypatch.undo()

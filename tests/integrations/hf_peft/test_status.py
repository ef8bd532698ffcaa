"""What ran: status counts the calls of accelerated layers, and a warning says when a report no longer holds."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.integrations import hf_peft


def counts(model, reset=True):
    """(fused, stock) since the last reset."""
    status = peftkern.status(model, reset=reset)
    return status.fused, status.stock


def test_calls_are_counted_with_the_reasons_of_those_that_fell_back(zoo):
    model = zoo.build("llama")
    inputs = zoo.batch("llama")
    model(**inputs)
    assert counts(model) == (0, 0)
    peftkern.accelerate(model)
    model(**inputs).loss.backward()
    assert counts(model, reset=False) == counts(model) == (12, 0)
    layers = zoo.lora_layers(model)
    first, second, *_ = layers
    handle = layers[first].lora_A["default"].register_forward_hook(lambda *a: None)
    layers[second].merge()
    with pytest.warns(RuntimeWarning, match="lora_A carries a hook"):
        model(**inputs)
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (10, 2) and list(status.reasons) == [first, second]
    assert "carries a hook" in status.reasons[first] and "merged" in status.reasons[second]
    text = str(status)
    assert text.splitlines()[0] == "peftkern: 10 calls ran fused, 2 ran PEFT's own code"
    assert f"1 {status.reasons[first]}" in text and first in text
    # The state ends; the reason of an earlier call stays until the next reset.
    handle.remove()
    layers[second].unmerge()
    model(**inputs)
    assert peftkern.status(model, reset=True).reasons == status.reasons
    assert peftkern.status(model) == hf_peft.Status()
    part = model.base_model.model.model.layers[0].self_attn
    model(**inputs)
    assert counts(part, reset=False) == (4, 0) and counts(model) == (12, 0)
    peftkern.restore(model)
    model(**inputs)
    assert counts(model) == (0, 0)


def test_every_way_to_call_a_layer_counts(zoo):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    x = torch.randn(2, 3, 24)
    layer(x, adapter_names=["default", "__base__"])
    assert counts(model) == (1, 0)
    layer(x, adapter_names=["__base__"] * 2)
    assert counts(model) == (0, 1)
    checkpoint(layer, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert counts(model) == (2, 0)  # once more in the recomputation
    with pytest.warns(RuntimeWarning, match="arguments of its own"), pytest.raises(TypeError):
        layer(x, strange=1)
    assert counts(model) == (0, 1)
    wrapped = nn.Sequential(torch.nn.DataParallel(model))
    wrapped(x)
    assert counts(wrapped) == (1, 0)


def test_threads_lose_no_call(zoo):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    x = torch.randn(1, 24)

    def work():
        with torch.no_grad():
            for _ in range(250):
                layer(x)

    threads = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert counts(model) == (2000, 0)


def test_a_patched_process_counts_too(zoo):
    hf_peft.patch()
    model, layer = zoo.layer()
    layer(torch.randn(2, 24))
    assert counts(model) == (1, 0)
    layer.lora_A["default"].register_forward_hook(lambda *a: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody said that it would run fused
        layer(torch.randn(2, 24))
    assert counts(model) == (0, 1)
    peftkern.restore(model)
    layer(torch.randn(2, 24))
    assert counts(model) == (0, 0)


def test_copies_and_pickles_start_at_zero(zoo):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    x = torch.randn(2, 24)
    layer(x)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for twin in twins:
        assert counts(twin) == (0, 0)
        twin(x)
        assert counts(twin) == (1, 0)
    assert counts(model) == (1, 0)
    # A copy is under the report of its original, which has warned for both.
    for m in (model, twins[0]):
        m.base_model.model[0].base_layer.register_forward_hook(lambda *a: None)
    with pytest.warns(RuntimeWarning, match="carries a hook"):
        twins[0](x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


def test_compiled_calls_are_not_counted_and_do_not_compile_again(zoo):
    model, layer = zoo.layer()
    torch._dynamo.reset()
    before = torch.compile(layer, fullgraph=True, backend="eager")  # compiled before it is accelerated
    x = torch.randn(4, 24)
    before(x)
    peftkern.accelerate(model)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    graphs = torch._dynamo.utils.counters["stats"]
    expected, _ = compiled(x), before(x)
    made = graphs["unique_graphs"]
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected)
        layer(x), before(x)
    assert graphs["unique_graphs"] == made and counts(model) == (3, 0)
    layer.base_layer.weight.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(x)
    assert graphs["unique_graphs"] > made and counts(model) == (0, 0)


class Other(nn.Linear):
    """A type that nobody knows."""


CHANGES = {
    "hook": lambda m: m.base_layer.register_forward_hook(lambda *a: None),
    "weight that requires grad": lambda m: m.base_layer.weight.requires_grad_(True),
    "replaced forward": lambda m: setattr(m.base_layer, "forward", nn.Linear(m.in_features, m.out_features).forward),
    "other dropout": lambda m: m.lora_dropout.update({"default": nn.AlphaDropout(0.0)}),
    "other type": lambda m: setattr(m.lora_A["default"], "__class__", Other),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_warning_when_the_report_no_longer_holds(zoo, change):
    model = zoo.build("bert")
    report = peftkern.accelerate(model)
    inputs = zoo.batch("bert")
    for layer in zoo.lora_layers(model).values():
        CHANGES[change](layer)
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(2):
            model(**inputs)
    (text,) = (str(w.message) for w in caught if "peftkern" in str(w.message))
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (0, 26) and list(status.reasons) == report.accelerated
    assert "torch.nn.modules.linear.Linear was reported as accelerated" in text
    assert status.reasons[report.accelerated[0]] in text
    # A new report knows it, so there is nothing to warn of.
    assert not peftkern.accelerate(model).accelerated
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model(**inputs)


def test_no_warning_for_what_was_asked_for(zoo):
    model = zoo.several("llama")
    inputs = zoo.batch("llama")["input_ids"]
    assert len(peftkern.accelerate(model).accelerated) == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.set_adapter("third")
        model(inputs)
        assert counts(model) == (4, 8)
        with model.disable_adapter():
            model(inputs)
        assert counts(model) == (0, 12)
        model.merge_adapter()
        model(inputs)
        assert counts(model) == (0, 12)
        model.unmerge_adapter()
        model(inputs, adapter_names=["third", "__base__", "third"])
        assert counts(model) == (4, 8)


def test_layers_of_other_types_are_named(zoo):
    mixed = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(1, 2, 1))
    model = zoo.peft.get_peft_model(mixed, zoo.peft.LoHaConfig(target_modules=["1"]))
    report = peftkern.accelerate(model)
    assert peftkern.status(model).reasons == report.skipped and list(report.skipped) == ["base_model.model.1"]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        peftkern.status("model")

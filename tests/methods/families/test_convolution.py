"""LoRA and DoRA on convolutions beyond what the parity test shows: dropout, what is declined, layouts, names, compiling."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import peftkern
from peftkern.integrations import hf_peft
from peftkern.methods import METHODS, tuner
from peftkern.methods.low_rank.lora import config

pytest.importorskip("peft", reason="HF PEFT is not installed")
from peft.tuners.lora import layer as peft_lora

C, N = 24, 20


def _both(*layers):
    model = tuner.layer(*layers)
    return copy.deepcopy(model), model


def _reason(layer, *configs):
    (reason,) = peftkern.accelerate(tuner.layer(layer, *configs)).skipped.values()
    return reason


@pytest.mark.parametrize(
    "dora, dtype",  # PEFT's own DoRA with dropout raises on a base in half precision
    [(False, torch.float32), (False, torch.bfloat16), (True, torch.float32)],
)
def test_dropout_by_its_mask(agree, monkeypatch, dtype, dora):
    kept = {}

    def mask(x):
        if x.shape not in kept:
            kept[x.shape] = (torch.rand(x.shape) < 0.7).to(torch.uint8)
        return kept[x.shape].to(x.dtype)

    monkeypatch.setattr(nn.functional, "dropout", lambda x, p, *rest: x * mask(x) / (1 - p))
    ours, stock = _both(nn.Conv2d(C, N, 3).to(dtype), config(lora_dropout=0.3, use_dora=dora))
    assert peftkern.accelerate(ours).accelerated
    agree(ours.train(), stock.train(), [torch.randn(2, C, 6, 5).to(dtype) for _ in range(4)], "dropout")
    status = peftkern.status(ours)
    assert (status.fused, status.stock) == (4, 0) and kept


def test_a_frozen_lora_A_keeps_what_it_gives_alone():
    model = tuner.layer(nn.Conv2d(C, N, 3), config(r=4, init_lora_weights=False)).train()
    model.base_model.model[0].lora_A.requires_grad_(False)
    stock = copy.deepcopy(model)
    peftkern.accelerate(model)
    with torch.inference_mode():  # which cannot be kept
        x = torch.randn(2, C, 40, 40)
    own, sizes = {p.data_ptr() for p in model.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * (t.data_ptr() not in own)) or t, lambda t: t
    ):
        y = model(x)
    assert sum(sizes) == 2 * 4 * 38 * 38
    y.square().mean().backward()
    stock(x).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), stock.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)
    assert peftkern.status(model).fused == 1


def test_dropout_draws_anew_and_is_reproducible():
    model = tuner.layer(nn.Conv1d(C, N, 3), config(lora_dropout=0.5)).train()
    peftkern.accelerate(model)
    x, found = torch.randn(2, C, 40), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model(x))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    "layer, reason",
    [
        (nn.Conv2d(C, C, 3, groups=4), "has groups"),
        (nn.Conv2d(C, N, 3, padding=1, padding_mode="circular"), "pads otherwise"),
        (nn.Conv1d(C, N, 3, padding="same"), "padding 'same'"),
        (nn.Conv1d(C, N, 3, dilation=2), "dilation"),
    ],
    ids=["groups", "circular", "same", "dilation"],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_layers_that_are_declined(layer, reason):
    assert reason in _reason(layer, config())


@pytest.mark.parametrize(
    "first, second", [({}, {"use_dora": True}), ({"use_dora": True}, {}), ({"use_dora": True},) * 2]
)
def test_dora_beside_another_adapter_is_declined(first, second):
    assert "is DoRA, and there are other" in _reason(nn.Conv2d(C, N, 3), config(**first), config(**second))


def test_adapters_of_which_one_drops():
    ours, stock = _both(nn.Conv2d(C, N, 3), config(lora_dropout=0.2), config())
    peftkern.accelerate(ours.train())
    assert "drops, and there are other" in hf_peft.why_not(ours.base_model.model[0])
    x = torch.randn(2, C, 5, 5)
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x), rtol=1e-4, atol=1e-4)
    assert peftkern.status(ours).fused == 1


def test_dora_without_a_batch_runs_the_librarys_code():
    model = tuner.layer(nn.Conv2d(C, N, 3, bias=False), config(use_dora=True))
    peftkern.accelerate(model)
    layer, x = model.base_model.model[0], torch.randn(C, 5, 5)
    assert "input has shape" in hf_peft.why_not(layer, x)
    with torch.no_grad():
        model(x[None])  # a plan is kept, which says nothing of dimensions
        expected = tuner.layer(nn.Conv2d(C, N, 3, bias=False), config(use_dora=True))
        expected.load_state_dict(model.state_dict())
        assert torch.equal(model(x), expected(x))
    assert peftkern.status(model).stock == 1


def test_channels_last_stays():
    ours, stock = _both(nn.Conv2d(C, N, 3).to(memory_format=torch.channels_last), config())
    peftkern.accelerate(ours)
    for size in (4, 20):  # beside and folded
        x = torch.randn(2, C, size, size).to(memory_format=torch.channels_last)
        y = ours(x)
        torch.testing.assert_close(y, stock(x), rtol=1e-4, atol=1e-4)
        assert y.stride() == stock(x).stride()


def test_a_wrong_number_of_channels_raises_what_the_library_raises():
    ours, stock = _both(nn.Conv2d(C, N, 3), config())
    peftkern.accelerate(ours)
    ours(torch.randn(1, C, 5, 5))
    errors = []
    for model in (ours, stock):
        with pytest.raises(RuntimeError) as error:
            model(torch.randn(1, C + 1, 5, 5))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_names_of_a_batch_run_the_librarys_code():
    ours, stock = _both(nn.Conv2d(C, N, 3), config(), config())
    peftkern.accelerate(ours)
    x, names = torch.randn(3, C, 5, 5), ["default", "__base__", "0"]
    ours.eval(), stock.eval()
    with pytest.warns(RuntimeWarning, match="adapter_names is not covered"):
        y = ours(x, adapter_names=names)
    assert torch.equal(y, stock(x, adapter_names=names))


def test_the_classes_get_their_own_forward_back():
    model = tuner.layer(nn.Conv2d(C, N, 3), config())
    peftkern.accelerate(model)
    assert "forward" in vars(peft_lora.Conv2d)
    peftkern.restore(model)
    del model
    gc.collect()
    hf_peft.unpatch()
    assert "forward" not in vars(peft_lora.Conv2d) and peft_lora.Conv2d.forward is peft_lora.Conv1d.forward


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("name", ["LoRA of convolutions", "DoRA of convolutions"])
def test_compiled(name, p):
    model = METHODS[name].examples(C, N)["Conv2d"].train()
    if p:
        model.base_model.model[0].lora_dropout["default"] = nn.Dropout(p)
    peftkern.accelerate(model)
    x, found = torch.randn(2, C, 6, 5), []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        torch.manual_seed(3)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.square().sum().backward()
        found.append([y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 3
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_dora_that_drops_on_a_base_in_half_precision_is_declined():
    # There the library's own code raises.
    layer = nn.Conv2d(C, N, 3, dtype=torch.bfloat16)
    model = tuner.layer(layer, config(use_dora=True, lora_dropout=0.3)).train()
    peftkern.accelerate(model)
    assert "not the base layer's" in hf_peft.why_not(model.base_model.model[0])
    x = torch.randn(2, C, 5, 5, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="should be the same"):
        model(x)
    assert model.eval()(x).dtype == torch.bfloat16 and peftkern.status(model).fused == 1

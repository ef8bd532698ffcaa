"""LoRA and DoRA on embeddings beyond what the parity test shows: what is declined, names, compiling."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peftkern
from peftkern.methods import METHODS, tuner
from peftkern.methods.low_rank.lora import config

pytest.importorskip("peft", reason="HF PEFT is not installed")

V, N = 24, 20


def _both(*layers):
    model = tuner.layer(*layers)
    return copy.deepcopy(model), model


def _reason(layer, *configs):
    (reason,) = peftkern.accelerate(tuner.layer(layer, *configs)).skipped.values()
    return reason


class _Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2.0


def _with_scale():
    layer = nn.Embedding(V, N)
    layer.embed_scale = 2.0
    return layer


@pytest.mark.parametrize(
    "layer, reason",
    [
        (nn.Embedding(V, N, max_norm=1.0), "has max_norm"),
        (nn.Embedding(V, N, scale_grad_by_freq=True), "has scale_grad_by_freq"),
        (nn.Embedding(V, N, sparse=True), "has sparse"),
        (_Scaled(V, N), "no nn.Embedding"),
        (_with_scale(), "an embed_scale of its own"),
    ],
    ids=["max_norm", "scale_grad_by_freq", "sparse", "another class", "a scale beside"],
)
def test_layers_that_are_declined(layer, reason):
    assert reason in _reason(layer, config())


def test_other_variants_and_combinations_are_declined():
    assert "MiCAEmbeddingVariant" in _reason(nn.Embedding(V, N), config(init_lora_weights="mica"))
    assert "is DoRA, and there are other" in _reason(nn.Embedding(V, N), config(), config(use_dora=True))


def test_dropout_does_not_act():
    # As in the library, whose layer has a dropout and leaves it out.
    ours, stock = _both(nn.Embedding(V, N), config(lora_dropout=0.5))
    peftkern.accelerate(ours)
    ids = torch.randint(0, V, (3, 9))
    torch.testing.assert_close(ours.train()(ids), stock.train()(ids))
    assert peftkern.status(ours).fused == 1


def test_sequences_of_any_length_keep_the_plan(monkeypatch):
    from peftkern.integrations.hf_peft import forward

    model = tuner.layer(nn.Embedding(V, N), config())
    peftkern.accelerate(model)
    model(torch.randint(0, V, (2, 5)))
    monkeypatch.setattr(forward, "look_at_call", None)  # a careful look would fail
    for shape in ((2, 6), (1, 1), (4,)):
        model(torch.randint(0, V, shape))
    assert peftkern.status(model).fused == 4


def test_ids_that_are_no_ids_raise_what_the_library_raises():
    ours, stock = _both(nn.Embedding(V, N), config())
    peftkern.accelerate(ours)
    errors = []
    for model in (ours, stock):
        with pytest.raises(RuntimeError) as error:
            model(torch.randn(2, 3))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_names_of_a_batch_run_the_librarys_code():
    ours, stock = _both(nn.Embedding(V, N), config(), config())
    peftkern.accelerate(ours)
    x, names = torch.randint(0, V, (3, 5)), ["default", "__base__", "0"]
    ours.eval(), stock.eval()
    with pytest.warns(RuntimeWarning, match="adapter_names is not covered"):
        y = ours(x, adapter_names=names)
    assert torch.equal(y, stock(x, adapter_names=names))


@pytest.mark.parametrize("name", ["LoRA of embeddings", "DoRA of embeddings"])
def test_compiled(name):
    model = METHODS[name].examples(V, N)["scaled by a tensor"].train()
    peftkern.accelerate(model)
    ids, found = torch.randint(0, V, (2, 9)), []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        model.zero_grad()
        y = call(ids)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 2
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(ids), model(ids))


def test_adapters_in_a_narrower_dtype_than_the_table():
    ours, stock = _both(nn.Embedding(V, N), config(use_dora=True))
    peftkern.accelerate(ours)
    ids = torch.randint(0, V, (5,))
    for model in (ours, stock):
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.bfloat16()
    with pytest.warns(RuntimeWarning, match="runs PEFT's own code"):
        assert torch.equal(ours(ids), stock(ids))


def test_ids_that_cannot_be_saved():
    ours, stock = _both(nn.Embedding(V, N), config())
    peftkern.accelerate(ours)
    with torch.inference_mode():
        ids = torch.randint(0, V, (5,))
    for model in (ours, stock):
        model.base_model.model[0].lora_embedding_A.requires_grad_(False)
        model(ids).sum().backward()
    grads = [model.base_model.model[0].lora_embedding_B["default"].grad for model in (ours, stock)]
    torch.testing.assert_close(*grads)

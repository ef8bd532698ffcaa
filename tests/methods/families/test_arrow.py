"""Arrow: which states of a router are taken, and that prototypes are PEFT's."""

import copy

import pytest
import torch
from torch import nn

import peftkern
from peftkern.integrations import hf_peft
from peftkern.methods import METHODS

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")

K, N = 24, 20


@pytest.fixture
def pair():
    ours = METHODS["Arrow"].examples(K, N)["two of three"].eval()
    stock = copy.deepcopy(ours)
    peftkern.accelerate(ours)
    return ours, stock


def _layer(model):
    return model.base_model.model[0]


def test_the_first_call_makes_the_prototypes(pair):
    for model in pair:
        arrow = _layer(model).lora_arrow["arrow_router"]
        arrow._protos_ready, arrow.rng_seed = False, 0
        for p in _layer(model).lora_A.parameters():
            p.data = p.data.flip(-1)
    ours, stock = pair
    x = torch.randn(7, K)
    assert "no prototypes yet" in hf_peft.why_not(_layer(ours))
    with pytest.warns(RuntimeWarning, match="no prototypes yet"):
        first = ours(x)
    assert torch.equal(first, stock(x))
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-5)
    assert (peftkern.status(ours).fused, peftkern.status(ours).stock) == (1, 1)


def test_general_knowledge_and_dropout_are_peft_s(pair):
    ours, _ = pair
    layer = _layer(ours)
    arrow = layer.lora_arrow["arrow_router"]
    arrow.use_gks = True
    assert "subtracts general knowledge" in hf_peft.why_not(layer)
    arrow.use_gks = False
    assert hf_peft.why_not(layer) is None
    layer.lora_dropout["arrow_router"] = nn.Dropout(0.5)
    assert "acts on its output" in hf_peft.why_not(layer)
    layer.eval()
    assert hf_peft.why_not(layer) is None


def test_a_batch_of_several_adapters_is_named(pair):
    ours, stock = pair
    x, names = torch.randn(2, 3, K), ["arrow_router", "0"]
    assert hf_peft.why_not(_layer(ours), x, names) == "a batch with adapter_names is not covered for Arrow"
    layers = [_layer(model) for model in pair]
    with pytest.warns(RuntimeWarning, match="not covered for Arrow"):
        got = layers[0](x, adapter_names=names)
    assert torch.equal(got, layers[1](x, adapter_names=names))


def test_beside_another_adapter(pair):
    for model in pair:
        model.base_model.set_adapter(["0", "arrow_router"])
    ours, stock = pair
    x = torch.randn(2, 3, K)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-5)
    assert peftkern.status(ours).fused == 1

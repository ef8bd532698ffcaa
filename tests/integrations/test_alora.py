"""Activated LoRA: adapters that act from their invocation on, by PEFT's ``alora_offsets``."""

import copy

import pytest
import torch
from torch import nn

import peftkern

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was reported as accelerated"),
    pytest.mark.filterwarnings("ignore:aLoRA is currently only supported for CAUSAL_LM"),
]

K, N, TOKENS = 24, 20, 5
INVOCATION = [7, 9]
# Of three sequences; a batch of single tokens has each of them wholly or not at all.
OFFSETS = {
    "some tokens": [None, 2, 100],
    "whole sequences": [None, 0, 5],
    "all": [5, 9, 5],
    "none": [None, 0, None],
    "not said": None,
}


def config(**options):
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["0"], **options}
    return peft.LoraConfig(alora_invocation_tokens=INVOCATION, **settings)


def pair(**options):
    ours = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config(**options))
    stock = copy.deepcopy(ours)
    assert peftkern.accelerate(ours).accelerated
    return ours, stock


def step(model, x, **kwargs):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model.base_model.model[0](x, **kwargs)
    y.backward(torch.ones_like(y).cumsum(-1))
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("case", OFFSETS)
@pytest.mark.parametrize("shape", [(3, TOKENS, K), (3, K), (3, 1, K), (3, 0, K)])
def test_parity(shape, case):
    ours, stock = pair()
    x = torch.randn(shape)
    got, want = (step(model, x, alora_offsets=OFFSETS[case]) for model in (ours, stock))
    assert got.keys() == want.keys() and len(got) == 4
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5, msg=f"{case}: {name}")
    assert (peftkern.status(ours).fused, peftkern.status(ours).stock) == (1, 0)


def test_offsets_of_each_call_are_its_own():
    ours, stock = pair()
    x, offsets = torch.randn(3, TOKENS, K), [1, 1, 1]
    for change in (0, 2, 5):
        offsets[0] = change  # in place: the list is the same
        for batch in (x, x[:, :3].contiguous(), x.double().float()):
            got, want = (step(model, batch, alora_offsets=offsets)["y"] for model in (ours, stock))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert peftkern.status(ours).stock == 0


def test_dropout_acts_on_tokens_with_the_adapter_alone():
    ours, _ = pair(lora_dropout=0.5)
    x = torch.randn(3, TOKENS, K)
    first, second = (step(ours.train(), x, alora_offsets=OFFSETS["some tokens"])["y"] for _ in range(2))
    differs = (first != second).any(-1)
    assert torch.equal(differs, torch.arange(TOKENS) >= torch.tensor([[5], [3], [0]]))


def test_batch_of_alora_lora_and_base():
    ours = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config(), adapter_name="activated")
    plain = peft.LoraConfig(r=7, lora_alpha=3, init_lora_weights=False, target_modules=["0"])
    ours.add_adapter("plain", plain)
    ours.add_adapter("another", config(r=3))
    ours.eval()
    stock = copy.deepcopy(ours)
    peftkern.accelerate(ours)
    names = ["plain", "activated", "__base__", "another", "activated"]
    for offsets in ([None, 2, None, 3, None], [None, 5, None, 9, 5], None):
        x = torch.randn(len(names), TOKENS, K)
        layers = (model.base_model.model[0] for model in (ours, stock))
        got, want = (layer(x, adapter_names=names, alora_offsets=offsets) for layer in layers)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (peftkern.status(ours).fused, peftkern.status(ours).stock) == (3, 0)


@pytest.mark.parametrize("offsets", [[1, 2], [1.0, 2, 3], torch.tensor([1, 2, 3]), "abc"])
def test_other_offsets_are_peft_s(offsets):
    ours, stock = pair()
    layers = [model.base_model.model[0] for model in (ours, stock)]
    x = torch.randn(3, TOKENS, K)
    try:
        want = layers[1](x, alora_offsets=offsets)
    except (RuntimeError, ValueError, IndexError) as error:
        with pytest.raises(type(error)):
            layers[0](x, alora_offsets=offsets)
    else:
        assert torch.equal(layers[0](x, alora_offsets=offsets), want)
    assert peftkern.status(ours).stock == 1 and "alora_offsets" in "".join(peftkern.status(ours).reasons.values())


def test_beside_another_active_adapter_is_peft_s():
    ours = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config())
    ours.add_adapter("plain", peft.LoraConfig(r=7, init_lora_weights=False, target_modules=["0"]))
    ours.base_model.set_adapter(["default", "plain"])
    stock = copy.deepcopy(ours)
    peftkern.accelerate(ours)
    x, offsets = torch.randn(3, TOKENS, K), OFFSETS["some tokens"]
    layers = [model.base_model.model[0] for model in (ours, stock)]
    assert torch.equal(*(layer(x, alora_offsets=offsets) for layer in layers))
    assert "an aLoRA adapter is active beside another" in next(iter(peftkern.status(ours).reasons.values()))
    torch.testing.assert_close(*(layer(x) for layer in layers), rtol=1e-5, atol=1e-5)
    assert peftkern.status(ours).fused == 1


@pytest.fixture
def llama(zoo):
    return zoo.build("llama", alora_invocation_tokens=INVOCATION)


PROMPTS = torch.tensor([[3, 4, 7, 9, 5], [1, 2, 3, 4, 5], [7, 9, 7, 9, 8]])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains(zoo, llama, checkpointing):
    stock = zoo.copy(llama)
    inputs = {"input_ids": PROMPTS, "labels": PROMPTS}
    answers = []
    peftkern.accelerate(llama)
    for model in (llama, stock):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        answers.append(zoo.loss_and_gradients(model.train(), inputs))
    (loss, logits, gradients), (stock_loss, stock_logits, stock_gradients) = answers
    torch.testing.assert_close((loss, logits), (stock_loss, stock_logits), rtol=1e-5, atol=1e-5)
    assert gradients and gradients.keys() == stock_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, stock_gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    assert peftkern.status(llama).stock == 0 and peftkern.status(llama).fused


def test_generate(zoo, llama):
    stock = zoo.copy(llama)
    peftkern.accelerate(llama)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    mask = torch.ones_like(PROMPTS)
    got, want = (
        model.eval().generate(input_ids=PROMPTS, attention_mask=mask, pad_token_id=0, **options)
        for model in (llama, stock)
    )
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    assert peftkern.status(llama).stock == 0 and peftkern.status(llama).fused
    with stock.disable_adapter():
        base = stock(PROMPTS).logits
    assert not torch.allclose(base[0, -1], want.logits[0][0]), "the adapter does nothing"

"""Tiny models with PEFT adapters whose weights are all non-zero, and a count of the calls that ran fused."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import peftkern
from peftkern.integrations import hf_peft
from peftkern.integrations.hf_peft import forward as hf_peft_forward
from peftkern.integrations.hf_peft import mixed as hf_peft_mixed
from peftkern.methods import linear
from peftkern.methods.low_rank import lora

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY = 64
ADAPTER = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.0, "init_lora_weights": False}


def _llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def _qwen2():
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def _bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config), ["query", "key", "value", "dense"]


def _gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), ["c_attn", "c_proj", "c_fc"]


MODELS = {"llama": _llama, "qwen2": _qwen2, "bert": _bert, "gpt2": _gpt2}


def lora_layers(model):
    """{name: layer} of the lora.Linear layers of a model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.layer.Linear)}


def randomise(model, seed=1, scale=0.3):
    """Every adapter weight (and bias) drawn anew, lora_B included: a zero B hides bugs."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g) * scale)
    return model


def build(kind, **options):
    """A tiny PEFT model of this kind with random adapters; the same weights for the same options.

    The adapters are small enough that rounding errors do not explode on their way through the layers.
    """
    torch.manual_seed(0)
    base, targets = MODELS[kind]()
    task = {"bert": "SEQ_CLS"}.get(kind, "CAUSAL_LM")
    settings = dict(ADAPTER, target_modules=targets, task_type=task, **options)
    if kind == "gpt2":
        settings["fan_in_fan_out"] = True
    return randomise(peft.get_peft_model(base, peft.LoraConfig(**settings)), scale=0.1)


def several(kind, **adapters):
    """A tiny PEFT model in evaluation mode with an adapter for every keyword, its value the options that differ.

    Default: ranks 4, 9 and 3, one rsLoRA, one on some of the layers, one with patterns.
    """
    torch.manual_seed(0)
    base, targets = MODELS[kind]()
    adapters = adapters or {
        "first": {"r": 4},
        "second": {"r": 9, "use_rslora": True},
        "third": {"r": 3, "target_modules": targets[1:3], "rank_pattern": {targets[1]: 5}, "lora_alpha": 7},
    }
    model = None
    for name, options in adapters.items():
        settings = {**ADAPTER, "target_modules": targets, "fan_in_fan_out": kind == "gpt2", **options}
        settings.setdefault("task_type", {"bert": "FEATURE_EXTRACTION"}.get(kind, "CAUSAL_LM"))
        config = peft.LoraConfig(**settings)
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return randomise(model, scale=0.1).eval()


def batch(kind, seed=3, rows=3, length=7):
    """Token ids and labels for ``build(kind)``."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=g)
    labels = torch.randint(0, 3, (rows,), generator=g) if kind == "bert" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def layer(K=24, N=20, *, bias=True, dtype=torch.float32, **options):
    """One lora.Linear inside a PEFT model, and that model. Adapters stay fp32, as PEFT makes them by default."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**dict(ADAPTER, target_modules=["0"], **options))
    model = randomise(peft.get_peft_model(nn.Sequential(nn.Linear(K, N, bias=bias, dtype=dtype)), config))
    return model, model.base_model.model[0]


def gradients(model):
    """{name: gradient} of the parameters that have one."""
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(model, inputs):
    """(loss, logits, {name: gradient}); the loss is a fixed random sum of the logits, taken in fp64 in every model."""
    model.zero_grad()
    logits = model(**inputs).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
    loss = (logits.double() * weights).mean()
    loss.backward()
    return loss.detach(), logits.detach(), gradients(model)


def as_accurate(ours, stock, exact, scale=None):
    """Assert: the error of ours against fp64 is at most 1.5 times stock's, or below 4 ulp of ``scale`` (default: the
    largest value; for the gradients of a model the largest of them all, since some are zero but for rounding)."""
    assert ours.shape == exact.shape and ours.dtype == stock.dtype, (ours.dtype, stock.dtype)
    if not exact.numel():
        return
    bits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11, torch.float64: 53}[ours.dtype]
    ulps = 0.5 if bits < 24 else 4.0
    floor = ulps * (exact.abs().max().item() if scale is None else scale) * 2.0**-bits
    error = (ours.double() - exact.double()).square().mean().sqrt().item()
    bound = 1.5 * (stock.double() - exact.double()).square().mean().sqrt().item()
    assert error <= max(bound, floor), f"error {error:.3g}, stock's times 1.5 {bound:.3g}, floor {floor:.3g}"


@pytest.fixture
def zoo():
    """What the tests of this folder share."""
    return SimpleNamespace(
        peft=peft, transformers=transformers, models=MODELS, build=build, several=several, batch=batch, layer=layer,
        lora_layers=lora_layers, randomise=randomise, gradients=gradients, loss_and_gradients=loss_and_gradients,
        as_accurate=as_accurate, copy=copy.deepcopy,
    )  # fmt: skip


@pytest.fixture
def fused(monkeypatch):
    """The list of calls of the fused function (their arguments after the matrices), to see which layers ran it."""
    calls, compute = [], linear.lora_linear_with

    def counting(x, weight, lora_A, lora_B, *options, **more):
        calls.append(options)
        return compute(x, weight, lora_A, lora_B, *options, **more)

    for module in (linear, lora):
        monkeypatch.setattr(module, "lora_linear_with", counting)
    return calls


@pytest.fixture
def fused_mixed(monkeypatch):
    """The list of calls of the fused function for mixed batches (x, ids), to see which layers ran it."""
    calls, run_again = [], hf_peft_forward.run_again

    def counting(x, weight, adapters, ids, **options):
        calls.append((x, ids))
        return peftkern.multi_lora_linear(x, weight, adapters, ids, **options)

    def counting_again(layer, kept, x, arguments):
        y = run_again(layer, kept, x, arguments)
        if y is not None:
            batch = hf_peft_mixed.batch_of(arguments["adapter_names"])
            calls.append((x, batch.ids(kept.again.names, x.device)))
        return y

    monkeypatch.setattr(hf_peft_mixed, "multi_lora_linear", counting)
    monkeypatch.setattr(hf_peft_forward, "run_again", counting_again)
    return calls


@pytest.fixture(autouse=True)
def stock_afterwards():
    """No patch survives a test."""
    yield
    hf_peft.unpatch()

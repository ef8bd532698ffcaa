"""Small models and their training, for tests that compare an accelerated model with the library's own."""

from __future__ import annotations

import dataclasses

import peft
import torch
import transformers
from torch import nn

from peftkern.methods import METHODS

VOCABULARY, STEPS, RANK = 32, 20, 4
# Arrow routes among adapters that are trained already: test_arrow.py.
TRAINED = [
    n for n, m in METHODS.items()
    if m.op != "multi_lora_linear" and m.of is None and m.layer is not None and m.trains and n != "Arrow"
]  # fmt: skip
# Methods that every model is trained with; the others have the first alone.
WIDELY = {
    "LoRA", "DoRA", "KaSA", "MiCA", "VeRA", "PVeRA", "AdaLoRA", "DeLoRA", "(IA)^3", "BEFT", "TinyLoRA", "OSF", "MiSS", "Uni-LoRA",
}  # fmt: skip
# What a method needs beside the config that its benchmark has: a schedule, names of layers, or values that a small model
# learns by.
_OPTIONS = {
    "VeRA": lambda targets: {"d_initial": 0.5},
    "AdaLoRA": lambda targets: {"target_r": 2, "tinit": 2, "tfinal": 4, "total_step": STEPS},
    "DeLoRA": lambda targets: {"delora_lambda": 4},
    "(IA)^3": lambda targets: {"feedforward_modules": targets[-1:]},
    "OSF": lambda targets: {"effective_rank": 3},
    "C3A": lambda targets: {"block_size": 8},
    "VB-LoRA": lambda targets: {"vector_length": 8, "num_vectors": 6},
    "OFT": lambda targets: {"oft_block_size": 4},
    "RoAd": lambda targets: {"group_size": 4},
    "Uni-LoRA": lambda targets: {"theta_d_length": 64},
    "LoHa": lambda targets: {"r": 2},
    "FourierFT": lambda targets: {"n_frequency": 100, "scaling": 10.0},
    "WaveFT": lambda targets: {"n_frequency": 100, "scaling": 2.0},
    "FRoD": lambda targets: {"sparse_rate": 0.1},
    "SHiRA": lambda targets: {"r": 2, "random_seed": 1},
    "RandLoRA": lambda targets: {"randlora_alpha": 8},
}


def _llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, attention_bias=True, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), ["q_proj", "k_proj", "down_proj"]


def _bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config), ["query", "value", "output.dense"]


def _gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_inner=24, n_layer=1, n_head=2, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), ["c_attn", "c_proj", "c_fc"]


MODELS = {"llama": _llama, "bert": _bert, "gpt2": _gpt2}


def base(kind):
    """A model without adapters and the layers to adapt, the same one at every call."""
    torch.manual_seed(0)
    return MODELS[kind]()


def task(kind):
    """PEFT's name for what the model does."""
    return "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"


def build(name, kind, targets=None):
    """A PEFT model with an adapter of this method, by the config that its benchmark has."""
    config = METHODS[name].build(nn.Linear(16, 16), RANK).peft_config["default"]
    model, usual = base(kind)
    targets = targets or usual
    options = {"target_modules": targets, "task_type": task(kind)}
    if hasattr(config, "fan_in_fan_out"):
        options["fan_in_fan_out"] = kind == "gpt2"
    if name in _OPTIONS:
        options |= _OPTIONS[name](targets)
    return peft.get_peft_model(model, dataclasses.replace(config, **options))


def batch(kind, seed, rows=3, length=6):
    """Token ids and labels."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=g)
    labels = torch.randint(0, 3, (rows,), generator=g) if kind == "bert" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def train(model, kind, optimiser=None):
    """Losses of ``STEPS`` steps on two batches in turn. Default: AdamW over all that trains."""
    if optimiser is None:
        optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, eps=1e-4)
    losses = []
    for step in range(STEPS):
        loss = model.train()(**batch(kind, step % 2)).loss
        loss.backward()
        optimiser.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses

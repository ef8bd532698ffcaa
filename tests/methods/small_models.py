"""Small models and their training, for tests that compare an accelerated model with the library's own."""

from __future__ import annotations

import torch
import transformers

VOCABULARY, STEPS = 32, 20


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


def batch(kind, seed):
    """Token ids and labels."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (3, 6), generator=g)
    labels = torch.randint(0, 3, (3,), generator=g) if kind == "bert" else ids
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

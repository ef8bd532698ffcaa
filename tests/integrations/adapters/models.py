"""Small models with adapters of AdapterHub, in fp64, and the comparison of their two codes."""

from __future__ import annotations

import adapters
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

import peftkern

HIDDEN, LAYERS, BATCH, LENGTH = 32, 2, 3, 9


def _bert():
    return BertModel(
        BertConfig(
            vocab_size=40,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=48,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _llama():
    return LlamaModel(
        LlamaConfig(
            vocab_size=40,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
        )
    )


def _gpt2():
    return GPT2Model(
        GPT2Config(
            vocab_size=40, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
    )


MODELS = {"bert": _bert, "llama": _llama, "gpt2": _gpt2}


def adapted(kind, *configs, train=True):
    """A model with an adapter for each config, named a, b, ..., the first one active, trained, with values that are no zeros.

    To be called while torch's default dtype is the one that the model shall have.
    """
    model = MODELS[kind]()
    adapters.init(model)
    for name, config in zip("abcdef", configs):
        model.add_adapter(name, config=config)
    model.train_adapter("a")
    for name, p in model.named_parameters():
        if p.requires_grad and not name.endswith("weight.original"):  # whose diagonal is signs
            nn.init.normal_(p, std=0.3)
    return model.to(torch.get_default_dtype()).train(train)  # Compacter's rules are made in fp32


def batch(padding="right", length=LENGTH):
    """Ids and an attention mask of sequences of several lengths."""
    ids = torch.randint(0, 40, (BATCH, length))
    mask = torch.ones(BATCH, length, dtype=torch.int64)
    for row, n in enumerate((length, length - 2, length - 4)):
        (mask[row, n:] if padding == "right" else mask[row, : length - n]).zero_()
    return {"input_ids": ids, "attention_mask": mask}


def outcome(model, inputs, dy=None):
    """The last hidden state and the gradients of all parameters that train, by name; None where there is none."""
    y = model(**inputs)[0]
    model.zero_grad(set_to_none=True)
    y.backward(torch.ones_like(y).cos().cumsum(1) if dy is None else dy)
    grads = {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }
    return y.detach(), grads


def same(model, inputs, rtol=1e-9, atol=1e-9):
    """Accelerates the model; its outcome is what it was before, in fused calls alone. Returns the report."""
    expected, grads = outcome(model, inputs)
    report = peftkern.accelerate(model)
    found, ours = outcome(model, inputs)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    assert grads.keys() == ours.keys()
    for name, grad in grads.items():
        assert (grad is None) == (ours[name] is None), name
        if grad is not None:
            torch.testing.assert_close(ours[name], grad, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    assert sum(bool(g.any()) for g in grads.values() if g is not None) > 1
    return report


def trained(model, optimizer, lr, steps=5):
    """Losses of some steps on one batch, from the same seed."""
    optimizer, losses = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr), []
    torch.manual_seed(5)
    for _ in range(steps):
        loss = model(**batch())[0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

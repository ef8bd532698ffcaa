"""The probes of AdapterHub's modules, in small models with an adapter: see least.py."""

from __future__ import annotations

from collections.abc import Iterator

import adapters
import torch
from torch import nn
from transformers import BertConfig, BertModel

from peftkern.dispatch.least import BOTTLENECK, GATE, PRODUCT, REFT

from .probe import Call, Probe, powers

SIDES, TOKENS = (64, 256), 32
# What has no other module of ours than those that the name speaks of, once the other names are out.
CONFIGS = {
    BOTTLENECK: "double_seq_bn",
    GATE: adapters.LoRAConfig(use_gating=True),
    REFT: "noreft",
    PRODUCT: "seq_bn",
}


def probes() -> Iterator[Probe]:
    """One for each name."""
    for name in (BOTTLENECK, GATE, REFT):
        yield Probe(name, powers(12, 22), lambda elements, name=name: _calls(name, elements, 1))
    yield Probe(PRODUCT, powers(20, 30), lambda work: _calls(PRODUCT, work, 2))


def _calls(name: str, work: int, power: int) -> Iterator[Call]:
    # The work of a module: its rows by the side of the layer, or of a linear layer, by its square.
    for side in SIDES:
        sequences = work // (side**power * TOKENS)
        if 1 <= sequences <= 256:
            yield _model(side, CONFIGS[name]), (torch.randint(40, (sequences, TOKENS)),)


def _model(side: int, config) -> nn.Module:
    model = BertModel(
        BertConfig(
            vocab_size=40, hidden_size=side, num_hidden_layers=1, num_attention_heads=4, intermediate_size=2 * side,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    adapters.init(model)
    model.add_adapter("a", config=config)
    model.train_adapter("a")
    return model

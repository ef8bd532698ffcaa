"""A method in a whole model, and an accelerated copy of it: a BERT with AdapterHub's adapters.

A training step from the embeddings on, which get a gradient as any x does, beside that of the frozen model; BERT's in fp32 and
with its own dropout. Hidden size K has K / 64 heads and blocks: 768 are BERT-base, 128 BERT-tiny.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftkern.methods import STREAM, StreamMethod
from peftkern.testing.residual import bottleneck

from ..core.case import Case
from ..core.presets import Choice, Entry
from ..layers import Data
from ..peers.candidates import NOT_HERE
from .stream import Stream
from .subject import Pair, accelerated, installed, randomised, trained

# Of an entry, the configurations that are timed: rows, hidden size and width of the bottleneck.
TIMED: dict[str, dict[str, tuple[int, int, int]]] = {
    "bottleneck adapter": {"double_seq_bn": (1024, 768, 48)},
}
DROPOUT = 0.1


def _bert(K: int) -> nn.Module:
    import transformers

    size = max(1, K // 64)
    config = transformers.BertConfig(
        vocab_size=1, hidden_size=K, num_hidden_layers=size, num_attention_heads=size, intermediate_size=4 * K,
        hidden_dropout_prob=DROPOUT, attention_probs_dropout_prob=DROPOUT,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).requires_grad_(False).train()


class Model(Stream):
    """The frozen model that ``make`` gives for a hidden size: of transformers, with K / 64 blocks."""

    def __init__(self, make: Callable[[int], nn.Module]):
        super().__init__(residual=False)
        self.make = make

    def data(self, case: Case, copies: int) -> Data:
        made = super().data(case, copies)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made.weights = [tuple(p.to(case.device, case.dtype) for p in self.make(case.K).parameters())] * copies
        return made

    def frozen(self, *weights: Tensor) -> nn.Module:
        model = self.make(weights[0].shape[1]).to(weights[0].device)
        for p, weight in zip(model.parameters(), weights, strict=True):
            p.data = weight
        return model

    def call(self, module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return module(inputs_embeds=args[0]).last_hidden_state

    def work(self, case: Case) -> tuple[int, int]:
        # A block's linear layers are as large as twelve of K x K.
        return tuple(12 * max(1, case.K // 64) * n for n in super().work(case))

    def pair(self, stock: nn.Module, ours: nn.Module, exact: Callable[[], nn.Module]) -> Pair:
        """Of the library's model, its accelerated copy, and what makes one of fp64."""

        def bound(model: nn.Module) -> Callable[..., Tensor]:
            return lambda h: self.call(model, (h,))

        def wide():
            model = exact()
            return bound(model), trained(model)

        return Pair.of((bound(stock), bound(ours)), (stock, ours), wide)


class ModelSubject(NamedTuple):
    """An entry of the registry and the configuration that is timed."""

    method: StreamMethod
    form: str

    on_layer = False
    beside = "adapters"
    layer = Model(_bert)

    @property
    def name(self) -> str:
        return f"{self.method.name}, {self.form} in BERT"

    @property
    def op(self) -> str:
        return self.method.op

    def entries(self) -> tuple[Entry, ...]:
        M, K, R = TIMED[self.method.name][self.form]
        return (Entry(M, K, K, R=(R,), dropouts=(DROPOUT,), dtypes=("fp32",)),)

    def choice(self, asked: Choice) -> Choice:
        return dataclasses.replace(asked, dtypes=asked.dtypes or ("fp32",), dropouts=None, adapters=None)

    def missing(self) -> str | None:
        return None if installed(self.beside) else f"{NOT_HERE}{self.beside} is not installed (make adapters-env)"

    def small(self, case: Case) -> Case:
        """In evaluation: BERT's dropout is not the adapter's."""
        return dataclasses.replace(case, M=48, K=128, N=128, R=min(case.R, 16), dropout=0.0)

    def pair(self, case: Case, weights: tuple[Tensor, ...]) -> Pair:
        import adapters

        stock = self.layer.frozen(*weights)
        adapters.init(stock)
        config = bottleneck.config(self.form, reduction_factor=case.K / case.R)
        stock.add_adapter("a", config=config)
        stock.train_adapter("a")
        stock = randomised(stock.to(case.device), 0.02).train(case.dropout > 0.0)
        return self.layer.pair(stock, accelerated(stock)[0], lambda: self.layer.exact(stock))


def subjects(name: str) -> list[ModelSubject]:
    """The configurations of an entry that are timed."""
    return [ModelSubject(STREAM[name], form) for form in TIMED[name]]

"""Contrastive fine-tuning, step by step, so that two models can be trained in turn and timed side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from .corpus import Pair
from .model import Tokenizer, Tokens, embed

TEMPERATURE = 0.05
LEARNING_RATE = 5e-4


@dataclass(frozen=True)
class Batch:
    """Token tensors of B names and of their B docstrings."""

    names: Tokens
    texts: Tokens


def batches(pairs: list[Pair], tokenizer: Tokenizer, size: int, steps: int, seed: int = 0) -> list[Batch]:
    """``steps`` batches of ``size`` pairs, drawn without replacement from a shuffled, repeated list."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < size * steps:
        order += torch.randperm(len(pairs), generator=generator).tolist()
    chosen = [[pairs[i] for i in order[k * size : (k + 1) * size]] for k in range(steps)]
    return [Batch(tokenizer([p.name for p in c]), tokenizer([p.text for p in c])) for c in chosen]


def contrastive_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of each name against all docstrings of the batch and the reverse (in-batch negatives)."""
    logits = embed(model, batch.names) @ embed(model, batch.texts).T / TEMPERATURE
    target = torch.arange(len(logits))
    loss = nn.functional.cross_entropy
    return (loss(logits, target) + loss(logits.T, target)) / 2


class OutOfTime(Exception):
    """Raised inside a step whose deadline has passed."""


@dataclass
class Trainer:
    """One model in training: its losses and the wall time of every finished step.

    ``seconds_left`` bounds the whole training: a step that passes it is broken off between two encoder layers.
    """

    model: nn.Module
    seconds_left: float = float("inf")
    learning_rate: float = LEARNING_RATE
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)
        self._deadline = float("inf")
        if self.seconds_left < float("inf"):
            watch(self.model, self._check)

    def _check(self) -> None:
        if time.perf_counter() > self._deadline:
            raise OutOfTime

    def step(self, batch: Batch, seed: int) -> bool:
        """One optimiser step; False if time ran out before its end (then nothing is recorded)."""
        torch.manual_seed(seed)
        start = time.perf_counter()
        self._deadline = start + self.seconds_left
        try:
            loss = contrastive_loss(self.model, batch)
            loss.backward()
        except OutOfTime:
            self._optimizer.zero_grad()
            self.seconds_left = 0.0
            return False
        finally:
            self._deadline = float("inf")  # the model is used after its training
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self.seconds_left -= self.seconds[-1]
        return True


def watch(model: nn.Module, check: Callable[[], None]) -> None:
    """Call ``check`` after every encoder layer, forward and backward."""

    def gradient_hook(grad: Tensor) -> None:
        check()

    def forward_hook(module, args, output) -> None:
        check()
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(gradient_hook)

    for module in model.modules():
        if type(module).__name__ == "BertLayer":
            module.register_forward_hook(forward_hook)


def train_in_turn(trainers: Sequence[Trainer], data: list[Batch]) -> Iterator[int]:
    """Give all the same batches and seeds, step by step, another one first each time; yields the step's number.

    A trainer whose time is over sits out, the others go on; it ends early when all are out of time.
    """
    for k, batch in enumerate(data):
        if all(trainer.seconds_left <= 0 for trainer in trainers):
            return
        for i in range(len(trainers)):
            trainer = trainers[(k + i) % len(trainers)]
            if trainer.seconds_left > 0:
                trainer.step(batch, seed=k)
        yield k


@dataclass(frozen=True)
class Timing:
    """Seconds of steps of ``pairs`` pairs by stock PEFT and by peftkern; a side that was too slow to time has none."""

    pairs: int
    stock: list[float]
    fused: list[float]

    @property
    def ratio(self) -> float | None:
        """Median of stock over that of peftkern, None where one is missing."""
        return median(self.stock) / median(self.fused) if self.stock and self.fused else None


def step_times(stock: Trainer, fused: Trainer, pairs: int) -> Timing:
    """The steps that both finished, the first (warm-up) left out; where those are fewer than two, each side's own."""
    both = min(len(stock.seconds), len(fused.seconds))
    sides = [t.seconds[1 : both if both > 2 else None] for t in (stock, fused)]
    return Timing(pairs, *(seconds if len(seconds) > 1 else [] for seconds in sides))

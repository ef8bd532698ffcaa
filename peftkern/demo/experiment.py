"""One comparison of stock PEFT and accelerated PEFT: the same model, data and seeds, trained in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import PeftModel

from peftkern import doctor
from peftkern.integrations.hf_peft import accelerate

from .corpus import Corpus
from .measure import copy_adapter, reload_difference, retrieval_accuracy, saved_bytes
from .model import Tokenizer, lora_model
from .train import Timing, Trainer, batches, step_times, train_in_turn

# Seconds of training that one run may take. Stock bf16 needs minutes per step on a CPU without bf16 instructions.
FUSED_SECONDS = 35.0
STOCK_SECONDS = {"fp32": 35.0, "bf16": 12.0}
# What the parts take, roughly: for the time left.
TRAINING_SECONDS, ACCURACY_SECONDS, RELOAD_SECONDS, REST_SECONDS = 40.0, 10.0, 4.0, 12.0
SMALL_BATCH, SMALL_STEPS, SMALL_SECONDS = 2, 5, 15.0
EQUAL_STEPS = 4
RELOADED_TEXTS = 32


@dataclass
class Side:
    """What was measured of one of the two runs."""

    losses: list[float]
    seconds: list[float]
    saved_bytes: int
    accuracy: float | None


@dataclass
class Result:
    """One dtype's comparison. ``timings``: at the size of the training's batches, and maybe at a smaller one."""

    dtype: str
    steps: int
    accuracy_before: float
    stock: Side
    fused: Side
    reload_difference: float
    accelerated_layers: int
    timings: list[Timing]
    notes: list[str] = field(default_factory=list)


def machine() -> str:
    """The CPU, its vector extension and the versions that the figures depend on."""
    found, cpu = doctor.versions(), doctor.cpu()
    names = ("torch", "peft", "transformers", "peftkern")
    return (
        f"{cpu['model']} ({cpu['torch_isa']}), {torch.get_num_threads()} threads, Python {found['python']}, "
        f"{', '.join(f'{name} {found[name]}' for name in names)}"
    )


def _pair(dtype: torch.dtype, **options) -> tuple[PeftModel, PeftModel, int]:
    """Two equal models, the second one accelerated, and the number of layers that it took."""
    stock, fused = lora_model(dtype, **options), lora_model(dtype, **options)
    report = accelerate(fused)
    if report.skipped:
        raise RuntimeError(f"the demo's layers should all be covered:\n{report}")
    return stock, fused, len(report.accelerated)


def compare(
    name: str,
    dtype: torch.dtype,
    corpus: Corpus,
    tokenizer: Tokenizer,
    size: int,
    steps: int,
    say: Callable[..., None] = lambda what, seconds=None, share=0.0: None,
) -> Result:
    """Train both models for ``steps`` steps of ``size`` pairs, within the time limits above, and measure. ``say`` is told of
    each part with the seconds that it may take, and then of the share of it that is done.

    Accuracies of both are those of the trained adapter in stock PEFT on the fp32 model: the same judge for all.
    """
    say(f"{name}: two models, bytes saved for backward", 5.0)
    data = batches(corpus.train, tokenizer, size, steps)
    stock_model, fused_model, layers = _pair(dtype)
    saved = saved_bytes(stock_model, data[0]), saved_bytes(fused_model, data[0])

    stock = Trainer(stock_model, STOCK_SECONDS[name])
    fused = Trainer(fused_model, FUSED_SECONDS)
    phase = f"{name}: training, stock and accelerated in turn"
    say(phase, TRAINING_SECONDS)
    for k in train_in_turn((stock, fused), data):
        say(f"{phase}, step {k + 1} of {steps}", share=(k + 1) / steps)

    say(f"{name}: held-out accuracy", ACCURACY_SECONDS)
    judge = lora_model(torch.float32)

    def accuracy(model: PeftModel) -> float:
        copy_adapter(model, judge)
        return retrieval_accuracy(judge, tokenizer, corpus.held_out)

    before = retrieval_accuracy(judge, tokenizer, corpus.held_out)
    after_fused = accuracy(fused_model)
    # An adapter without a step is the untrained one.
    after_stock = accuracy(stock_model) if stock.losses else None

    say(f"{name}: reloading the adapter into stock PEFT", RELOAD_SECONDS)
    texts = [pair.text for pair in corpus.held_out[:RELOADED_TEXTS]]
    result = Result(
        dtype=name,
        steps=steps,
        accuracy_before=before,
        stock=Side(stock.losses, stock.seconds, saved[0], after_stock),
        fused=Side(fused.losses, fused.seconds, saved[1], after_fused),
        reload_difference=reload_difference(fused_model, dtype, tokenizer, texts),
        accelerated_layers=layers,
        timings=[step_times(stock, fused, size)],
    )
    for label, trainer, limit in (("stock", stock, STOCK_SECONDS[name]), ("peftkern", fused, FUSED_SECONDS)):
        if len(trainer.losses) < steps:
            result.notes.append(f"{name} {label}: {len(trainer.losses)} of {steps} steps in its {limit:.0f} s")
    return result


def small_steps(dtype: torch.dtype, corpus: Corpus, tokenizer: Tokenizer) -> Timing:
    """Steps of few pairs: what a dtype is timed on whose full steps stock cannot finish, and the others beside it."""
    stock_model, fused_model, _ = _pair(dtype)
    stock, fused = Trainer(stock_model, SMALL_SECONDS), Trainer(fused_model, SMALL_SECONDS)
    for _ in train_in_turn((stock, fused), batches(corpus.train, tokenizer, SMALL_BATCH, SMALL_STEPS)):
        pass
    return step_times(stock, fused, SMALL_BATCH)


def losses_without_dropout(corpus: Corpus, tokenizer: Tokenizer, size: int) -> float:
    """Largest difference of the two loss curves over a few fp32 steps with dropout 0, where they differ by rounding."""
    stock_model, fused_model, _ = _pair(torch.float32, dropout=0.0)
    stock, fused = Trainer(stock_model), Trainer(fused_model)
    for _ in train_in_turn((stock, fused), batches(corpus.train, tokenizer, size, EQUAL_STEPS)):
        pass
    return max(abs(a - b) for a, b in zip(stock.losses, fused.losses))

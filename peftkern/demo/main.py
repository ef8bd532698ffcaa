"""``python -m peftkern demo``: the same fine-tuning by stock HF PEFT and through peftkern, step by step in turn.

Every number printed is measured in this run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from peftkern.benchmarks.measure.interference import Meter
from peftkern.screen import Console

from .corpus import Corpus, collect
from .experiment import (
    ACCURACY_SECONDS,
    EQUAL_STEPS,
    RELOAD_SECONDS,
    REST_SECONDS,
    SMALL_BATCH,
    TRAINING_SECONDS,
    Result,
    compare,
    losses_without_dropout,
    machine,
    small_steps,
)
from .model import DROPOUT, RANK, Tokenizer, weights
from .report import plot, print_table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="peftkern demo",
        description=f"Fine-tunes all-MiniLM-L6-v2 (LoRA r={RANK}, dropout {DROPOUT}) to find a standard library "
        "function's docstring by its name, with stock HF PEFT and accelerated, and compares the two.",
    )
    parser.add_argument("--quick", action="store_true", help="few steps on little text: does everything work?")
    parser.add_argument("--steps", type=int, help="training steps of each run (default 24, quick 4)")
    parser.add_argument("--dtype", choices=[*DTYPES, "both"], default="both", help="dtype of the frozen model")
    parser.add_argument("--png", type=Path, metavar="PATH", help="also draw the results into this file")
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = 4 if args.quick else 24
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code (3: the model's weights are not installed)."""
    args = _parse(argv)
    start = time.perf_counter()
    console = Console()
    try:
        weights()
    except ModuleNotFoundError as error:
        print(f"peftkern demo: {error}", file=sys.stderr)
        return 3
    # Loading a BERT through PEFT warns of transformers' own deprecations.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    torch.set_num_threads(min(torch.get_num_threads(), os.cpu_count() or 1))

    console.print(f"peftkern demo on {machine()}", style="bold")
    meter = Meter()
    names = list(DTYPES) if args.dtype == "both" else [args.dtype]
    expected = len(names) * (TRAINING_SECONDS + ACCURACY_SECONDS + RELOAD_SECONDS) + REST_SECONDS
    with console.progress(expected, prior=expected / 10) as progress:
        part = 0.0

        def say(what: str, seconds: float | None = None, share: float = 0.0) -> None:
            nonlocal part
            if seconds is not None:
                progress.advance(part)
                part = seconds
            progress.say(what, share * part)

        say("reading the standard library")
        corpus = collect(*((256, 64) if args.quick else (4096, 320)))
        size = 8 if args.quick else 32
        results, difference = _experiments(corpus, size, args.steps, names, say)

    console.print(
        f"text: {len(corpus.train)} names with docstrings to train on, {len(corpus.held_out)} of other modules to "
        f"test on; {size} pairs a step"
    )
    print_table(console, results, difference)
    if args.png is not None:
        plot(results, args.png, machine(), meter.cores())
        console.print(f"picture: {args.png}")
    console.print(f"total time: {time.perf_counter() - start:.0f} s")
    return 0


def _experiments(corpus: Corpus, size: int, steps: int, dtypes: list[str], say) -> tuple[list[Result], float]:
    tokenizer = Tokenizer()
    results = [compare(name, DTYPES[name], corpus, tokenizer, size, steps, say) for name in dtypes]
    if steps >= 3 and any(result.timings[0].ratio is None for result in results):
        # Then every dtype is timed on small steps, so that like stands beside like.
        for result in results:
            say(f"{result.dtype}: step time at {SMALL_BATCH} pairs", 0.0)
            result.timings.append(small_steps(DTYPES[result.dtype], corpus, tokenizer))
    say(f"{EQUAL_STEPS} steps without dropout", REST_SECONDS)
    return results, losses_without_dropout(corpus, tokenizer, size)

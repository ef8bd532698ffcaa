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
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .corpus import Corpus, collect
from .experiment import EQUAL_STEPS, Result, compare, losses_without_dropout, machine
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
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    try:
        weights()
    except ModuleNotFoundError as error:
        print(f"peftkern demo: {error}", file=sys.stderr)
        return 3
    # Loading a BERT through PEFT warns of transformers' own deprecations.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    torch.set_num_threads(min(torch.get_num_threads(), os.cpu_count() or 1))

    console.print(f"[bold]peftkern demo[/] on {machine()}")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading the standard library")

        def say(what: str, detail: str = "") -> None:
            progress.update(task, description=f"{what}{detail}")
            # A log gets a line for each phase, a terminal the step within it as well.
            if not console.is_terminal and not detail:
                console.print(f"  {time.perf_counter() - start:5.0f} s  {what}")

        corpus = collect(*((256, 64) if args.quick else (4096, 320)))
        size = 8 if args.quick else 32
        names = list(DTYPES) if args.dtype == "both" else [args.dtype]
        results, difference = _experiments(corpus, size, args.steps, names, say)

    console.print(
        f"text: {len(corpus.train)} names with docstrings to train on, {len(corpus.held_out)} of other modules to "
        f"test on; {size} pairs a step"
    )
    print_table(console, results, difference)
    if args.png is not None:
        plot(results, args.png)
        console.print(f"picture: {args.png}")
    console.print(f"total time: {time.perf_counter() - start:.0f} s")
    return 0


def _experiments(corpus: Corpus, size: int, steps: int, dtypes: list[str], say) -> tuple[list[Result], float]:
    tokenizer = Tokenizer()
    results = [compare(name, DTYPES[name], corpus, tokenizer, size, steps, say) for name in dtypes]
    say(f"{EQUAL_STEPS} steps without dropout")
    return results, losses_without_dropout(corpus, tokenizer, size)

"""The demo's results as a table for the terminal and as one picture."""

from __future__ import annotations

import datetime
import math
import statistics
from pathlib import Path

from peftkern.benchmarks.measure.interference import BUSY_CORES
from peftkern.benchmarks.tables.figure import Figure, plain_axis
from peftkern.screen import Console, Table

from .experiment import EQUAL_STEPS, RELOADED_TEXTS, Result
from .model import RANK
from .train import Timing

_LAST = 5
COLOURS = {"stock PEFT": "#9a9a9a", "peftkern": "#0b3d91"}


def _final_loss(losses: list[float]) -> str:
    last = losses[-_LAST:]
    return f"{sum(last) / len(last):.3f}" if last else "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _megabytes(n: int) -> str:
    return f"{n / 1e6:.1f} MB"


def _quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile in ms."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return 1e3 * low, 1e3 * middle, 1e3 * high


def _milliseconds(seconds: list[float]) -> str:
    if not seconds:
        return "too slow to time"
    low, middle, high = _quartiles(seconds)
    return f"{middle:.0f} ms ±{(high - low) / 2 / middle:.0%}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _row_values(result: Result) -> list[tuple[str, str, str, str]]:
    """Rows (what, stock, peftkern, ratio stock / peftkern) of one dtype."""
    stock, fused = result.stock, result.fused
    rows = [("steps trained", f"{len(stock.losses)}", f"{len(fused.losses)} of {result.steps}", "")]
    for t in result.timings:
        rows.append((f"median step, {t.pairs} pairs", _milliseconds(t.stock), _milliseconds(t.fused), _times(t.ratio)))
    ratio = stock.saved_bytes / fused.saved_bytes
    before = _percent(result.accuracy_before)
    return [
        *rows,
        ("saved for backward", _megabytes(stock.saved_bytes), _megabytes(fused.saved_bytes), _times(ratio)),
        (f"loss, mean of last {_LAST} steps", _final_loss(stock.losses), _final_loss(fused.losses), ""),
        (f"held-out accuracy (before: {before})", _percent(stock.accuracy), _percent(fused.accuracy), ""),
    ]


def print_table(console: Console, results: list[Result], difference: float) -> None:
    """Print every comparison; ``difference`` is that of the losses without dropout."""
    table = Table(
        "HF PEFT, stock and accelerated by peftkern, same seed, steps in turn",
        ("model", "", "stock PEFT", "peftkern", "stock / peftkern"), left=("model", ""),
        caption="±: half the distance between the quartiles of the steps.",
    )  # fmt: skip
    for result in results:
        for k, row in enumerate(_row_values(result)):
            table.add(result.dtype if k == 0 else "", *row)
    console.print(table)
    for result in results:
        console.print(
            f"{result.dtype}: {result.accelerated_layers} layers accelerated; adapter saved by the accelerated model "
            f"and loaded into stock PEFT: embeddings of {RELOADED_TEXTS} texts differ by at most "
            f"{result.reload_difference:.1e}"
        )
        for note in result.notes:
            console.print(f"note: {note}")
    console.print(f"dropout 0, fp32: losses of {EQUAL_STEPS} steps differ by at most {difference:.1e}")


def plot(results: list[Result], path: Path, machine: str, others: float | None) -> None:
    """Draw losses, step times and bytes saved for backward into ``path``. ``others``: cores that other processes used."""
    sizes = dict.fromkeys(t.pairs for r in results for t in r.timings)
    foot = [
        "Same seeds and batches, steps in turn. Bars: medians; whiskers: quartiles of the steps. Saved: distinct storages that "
        "autograd keeps, parameters left out.",
        f"{'Other work was not measured' if others is None else f'Other processes used {others:.2f} cores meanwhile'}. "
        f"{machine}; {datetime.date.today()}",
    ]
    busy = f"other processes used {others:.2f} cores meanwhile" if others and others > BUSY_CORES else ""
    title = f"all-MiniLM-L6-v2, LoRA of rank {RANK}: fine-tuned by stock PEFT and by peftkern"
    figure = Figure(title, foot, busy, width=10.5, rows=2, row_height=2.9)
    above, below = [f"loss {r.dtype}" for r in results], [*(f"time {n}" for n in sizes), "saved"]
    columns = math.lcm(len(above), len(below))
    grid = [[name for name in row for _ in range(columns // len(row))] for row in (above, below)]
    axes = figure.figure.subplot_mosaic(grid)
    for result in results:
        _losses(axes[f"loss {result.dtype}"], result)
    for size in sizes:
        ax = axes[f"time {size}"]
        _step_times(ax, [(r.dtype, t) for r in results for t in r.timings if t.pairs == size])
        plain_axis(ax, "ms", f"median step of {size} pairs")
    saved = {r.dtype: (r.stock.saved_bytes / 1e6, r.fused.saved_bytes / 1e6) for r in results}
    for x, values in enumerate(saved.values()):
        for name, offset, value in zip(COLOURS, (-0.2, 0.2), values):
            _bar(axes["saved"], x + offset, value, name, f"{value:.0f}")
    axes["saved"].set_xticks(range(len(saved)), list(saved))
    axes["saved"].margins(y=0.15)
    plain_axis(axes["saved"], "MB", "saved for backward")
    figure.save(path, COLOURS)


def _losses(ax, result: Result) -> None:
    # Stock is drawn wide: where the curves agree, it shows as a rim around the other.
    for name, side, width in (("stock PEFT", result.stock, 6.0), ("peftkern", result.fused, 1.5)):
        if side.losses:
            steps = range(1, len(side.losses) + 1)
            ax.plot(steps, side.losses, "o-", ms=width, lw=width, color=COLOURS[name], label=name)
    if result.notes:
        ax.text(0.97, 0.95, "\n".join(result.notes), transform=ax.transAxes, ha="right", va="top", fontsize=8.5, color="#444444",
                bbox=dict(boxstyle="round", facecolor="#f4f4f4", edgecolor="#bbbbbb"))  # fmt: skip
    ax.set(xlim=(0.5, result.steps + 0.5), ylim=(0, None))
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("step", fontsize=9)
    plain_axis(ax, "contrastive loss", f"{result.dtype} base")


def _step_times(ax, timings: list[tuple[str, Timing]]) -> None:
    for x, (_, timing) in enumerate(timings):
        for name, offset, seconds in zip(COLOURS, (-0.2, 0.2), (timing.stock, timing.fused)):
            if seconds:
                low, middle, high = _quartiles(seconds)
                ax.errorbar(x + offset, middle, ((middle - low,), (high - middle,)), color="#222222", elinewidth=0.9,
                            capsize=2.5, zorder=3)  # fmt: skip
                _bar(ax, x + offset, middle, name, f"{middle:.0f}", above=high)
            else:
                ax.text(
                    x + offset,
                    0,
                    " too slow to time",
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    color="#777777",
                )
    ax.set_xticks(range(len(timings)), [dtype for dtype, _ in timings])
    ax.set_xlim(-0.6, len(timings) - 0.4)
    ax.margins(y=0.15)


def _bar(ax, x: float, value: float, name: str, text: str, above: float | None = None) -> None:
    ax.bar(x, value, 0.38, color=COLOURS[name], label=name, zorder=2)
    ax.text(x, value if above is None else above, text, ha="center", va="bottom", fontsize=8)

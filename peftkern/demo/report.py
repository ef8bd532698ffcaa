"""The demo's results as a table for the terminal and as one picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from .experiment import EQUAL_STEPS, RELOADED_TEXTS, Result

_LAST = 5


def _final_loss(losses: list[float]) -> str:
    last = losses[-_LAST:]
    return f"{sum(last) / len(last):.3f}" if last else "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _megabytes(n: int) -> str:
    return f"{n / 1e6:.1f} MB"


def _row_values(result: Result) -> list[tuple[str, str, str, str]]:
    """Rows (what, stock, peftkern, ratio stock / peftkern) of one dtype."""
    stock, fused = result.stock, result.fused
    rows = [("steps trained", str(len(stock.losses)), str(len(fused.losses)), "")]
    label = f"median step, {result.timed_pairs} pairs"
    if result.timed is None:
        rows.append((label, "-", "-", "-"))
    else:
        a, b = result.timed
        rows.append((label, f"{1e3 * a:.0f} ms", f"{1e3 * b:.0f} ms", f"{a / b:.2f}x"))
    rows += [
        (
            "saved for backward",
            _megabytes(stock.saved_bytes),
            _megabytes(fused.saved_bytes),
            f"{stock.saved_bytes / fused.saved_bytes:.2f}x",
        ),
        (f"loss, mean of last {_LAST} steps", _final_loss(stock.losses), _final_loss(fused.losses), ""),
        (
            f"held-out accuracy (before: {_percent(result.accuracy_before)})",
            _percent(stock.accuracy),
            _percent(fused.accuracy),
            "",
        ),
    ]
    return rows


def print_table(console: Console, results: list[Result], difference: float) -> None:
    """Print every comparison; ``difference`` is that of the losses without dropout."""
    table = Table(title="HF PEFT, stock and accelerated by peftkern, same seed, steps in turn")
    table.add_column("model")
    table.add_column("")
    for head in ("stock PEFT", "peftkern", "stock / peftkern"):
        table.add_column(head, justify="right")
    for result in results:
        for k, row in enumerate(_row_values(result)):
            table.add_row(result.dtype if k == 0 else "", *row)
        table.add_section()
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


def plot(results: list[Result], path: Path) -> None:
    """Draw loss curves, step times and bytes saved for backward into ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"stock": "#bbbbbb", "peftkern": "#1f77b4"}
    figure, axes = plt.subplots(1, len(results) + 2, figsize=(4 * (len(results) + 2), 3.6), layout="constrained")
    for axis, result in zip(axes, results):
        # Stock is drawn wide: where the curves agree, it shows as a rim around the other.
        for name, side, width in (("stock", result.stock, 6), ("peftkern", result.fused, 1.5)):
            if side.losses:
                steps = range(1, len(side.losses) + 1)
                axis.plot(steps, side.losses, "o-", ms=width, lw=width, color=colors[name], label=name)
        axis.set(title=f"{result.dtype}: contrastive loss", xlabel="step", ylim=(0, None))
        axis.locator_params(axis="x", integer=True)
        axis.legend()

    timed = [r for r in results if r.timed is not None]
    _bars(axes[-2], [(f"{r.dtype}\n{r.timed_pairs} pairs", *(1e3 * s for s in r.timed)) for r in timed], colors)
    axes[-2].set(title="median step, ms")
    saved = [(r.dtype, r.stock.saved_bytes / 1e6, r.fused.saved_bytes / 1e6) for r in results]
    _bars(axes[-1], saved, colors)
    axes[-1].set(title="saved for backward, MB")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axis, rows: list[tuple[str, float, float]], colors: dict[str, str]) -> None:
    for offset, (name, color) in enumerate(colors.items()):
        bars = axis.bar([k + 0.4 * offset for k in range(len(rows))], [r[1 + offset] for r in rows], 0.38, color=color)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
        bars.set_label(name)
    axis.set_xticks([k + 0.2 for k in range(len(rows))], [r[0] for r in rows])
    axis.margins(y=0.3)  # room for the legend
    if rows:
        axis.legend()

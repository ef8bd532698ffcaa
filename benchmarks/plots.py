"""Plots of a result: time over the frozen linear against M, and bars per shape."""

from __future__ import annotations

from pathlib import Path

from .case import BASE, FP32_BASE, Bench
from .judge import geomean

PASS = "fwd_bwd"


def plot(result: dict, bench: Bench, folder: Path) -> list[Path]:
    """Write ``<op>-<dtype>-rows.png`` and ``-shapes.png`` for each dtype; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        rows = [r for r in result["rows"] if r["dtype"] == dtype and r["pass"] == PASS and r["median_ms"] is not None]
        rows = [r for r in rows if r["provider"] not in (BASE, FP32_BASE)]
        slow = all(r["ratio_to_base"] is None for r in rows)
        key, over = ("ratio_to_fp32_base", "frozen fp32 linear") if slow else ("ratio_to_base", "frozen linear")
        rows = [r for r in rows if r[key] is not None]
        if not rows:
            continue
        # One rank and one dropout: not every provider is timed on all, and means over different cases mislead.
        R = min({r["R"] for r in rows}, key=lambda R: abs(R - 16))
        dropout = max(r["dropout"] for r in rows)
        rows = [r for r in rows if (r["R"], r["dropout"]) == (R, dropout)]
        title = f"{bench.name} {dtype}, forward + backward, R = {R}, dropout {dropout:g}\n{result['header']['device']}"
        for name, draw in (("rows", _against_rows), ("shapes", _bars)):
            file = folder / f"{bench.name}-{dtype}-{name}.png"
            draw(rows, bench, key, f"time / {over}", title, file)
            files.append(file)
    return files


def _series(rows: list[dict], bench: Bench) -> dict[str, list[dict]]:
    """Rows by legend entry: the provider, with the adapters' dtype where both were measured."""
    both = len({r["adapter_dtype"] for r in rows}) > 1
    series: dict[str, list[dict]] = {}
    for name, provider in bench.providers.items():
        for row in rows:
            if row["provider"] == name:
                label = f"{provider.title}, {row['adapter_dtype']} adapters" if both else provider.title
                series.setdefault(label, []).append(row)
    return series


def _against_rows(rows: list[dict], bench: Bench, key: str, ylabel: str, title: str, file: Path) -> None:
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for label, own in _series(rows, bench).items():
        by_M: dict[int, list[float]] = {}
        for row in own:
            by_M.setdefault(row["M"], []).append(row[key])
        points = sorted((M, geomean(values)) for M, values in by_M.items())
        ax.plot(*zip(*points), marker="o", label=label, linewidth=2.5 if label.startswith("peftkern") else 1.2)
    _finish(ax, ylabel, title)
    ax.set_xscale("log", base=2)
    ax.set_xlabel("rows M (geometric mean over the other sizes)")
    fig.savefig(file, dpi=130)
    plt.close(fig)


def _bars(rows: list[dict], bench: Bench, key: str, ylabel: str, title: str, file: Path) -> None:
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((r["M"], r["K"], r["N"]) for r in rows))
    series = _series(rows, bench)
    fig, ax = plt.subplots(figsize=(1.5 + 1.4 * len(shapes), 4.5), layout="constrained")
    width = 0.8 / len(series)
    for i, (label, own) in enumerate(series.items()):
        for j, shape in enumerate(shapes):
            values = [r[key] for r in own if (r["M"], r["K"], r["N"]) == shape]
            if values:
                x = j + (i - (len(series) - 1) / 2) * width
                ax.bar(x, geomean(values), width * 0.95, color=f"C{i}", label=label if j == 0 else None)
    _finish(ax, ylabel, title)
    ax.set_xticks(range(len(shapes)), ["x".join(map(str, s)) for s in shapes], rotation=20, fontsize=8)
    ax.set_xlabel("M x K x N")
    fig.savefig(file, dpi=130)
    plt.close(fig)


def _finish(ax, ylabel: str, title: str) -> None:
    ax.axhline(1.0, color="black", linewidth=0.8)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ticks = [t for t in (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 5, 8, 16, 32) if low <= t <= high]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_ylabel(ylabel)
    ax.set_title(title, fontsize=10)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(fontsize=8)

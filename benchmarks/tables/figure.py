"""What every figure of a benchmark has: a title that fits, a caption with all that its numbers depend on, quartiles, one
colour a provider, and a mark where the machine was busy."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

from ..judge.figures import geomean
from ..measure import interference

PALETTE = ("#7a7a7a", "#e69f00", "#56b4e9", "#cc79a7", "#009e73", "#d55e00", "#8c6d31", "#9467bd", "#17becf", "#bcbd22")
OURS = ("#0b3d91", "#2a7de1", "#7b4fb5", "#008b8b", "#6aa5e8", "#3f2a7a")
# Ticks of a ratio by the largest range that they suit: few over a wide one, more over a narrow one.
TICKS = {
    4.5: (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3),
    15: (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10),
    float("inf"): (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500),
}
DPI = 140


def colours(names: list[str]) -> dict[str, str]:
    """One colour for each provider: blues for peftkern's own, which stand out."""
    ours = [n for n in names if n.startswith("peftkern")]
    others = [n for n in names if n not in ours]
    return {n: OURS[i % len(OURS)] for i, n in enumerate(ours)} | {
        n: PALETTE[i % len(PALETTE)] for i, n in enumerate(others)
    }


def quartiles(rows: list[dict], key: str) -> tuple[float, float, float]:
    """(value, what lies below it, what lies above it) for error bars: geometric means over rows of ``key``, a time over
    another's median, and of the quartiles of its rounds."""
    value = geomean([r[key] for r in rows])
    low, high = (
        geomean([r[key] * (r[q] or r["median_ms"]) / r["median_ms"] for r in rows]) for q in ("p25_ms", "p75_ms")
    )
    return value, max(value - low, 0.0), max(high - value, 0.0)


def caption(header: dict) -> str:
    """Machine, versions, threads, date and commit of a result, for the foot of a figure."""
    versions = header["versions"]
    names = {"torch": "torch", "peft": "PEFT", "triton": "Triton", "peftkern": "peftkern"}
    parts = [f"{label} {versions[name]}" for name, label in names.items() if versions.get(name)]
    isa = header["gpu"]["arch"] if header.get("gpu") else header["cpu"]["torch_isa"]
    commit = f"commit {header['commit'][:10]}" if header.get("commit") else "an installed package"
    return (
        f"{header['device']} ({isa}), {header['threads']} threads, Python {versions['python']}, {', '.join(parts)}; "
        f"{header['date'][:10]}, {commit}"
    )


class Figure:
    """A matplotlib figure of ``rows`` rows of panels, which whoever asked for it makes in ``figure``, with room above for a
    title and a mark (``busy``), and below for a legend and lines of small print (``foot``)."""

    def __init__(self, title: str, foot: Iterable[str], busy: str, *, width: float, rows: int, row_height: float = 3.1):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        self._plt, self._width, self._busy = plt, width, f"BUSY MACHINE: {busy}. No verdict." if busy else ""
        self._title = self._wrap(title, 12, 0.62)
        self._foot = "\n".join(self._wrap(text, 8) for text in foot)
        self._title_height = 0.24 * (1 + self._title.count("\n")) + 0.16
        self._top = self._title_height + 0.36 * bool(busy)
        self._bottom = 0.145 * (1 + self._foot.count("\n")) + 0.22
        self._height = self._top + self._bottom + row_height * rows + 0.35
        self.figure = plt.figure(figsize=(width, self._height), layout="constrained")

    def _wrap(self, text: str, size: float, letter: float = 0.53) -> str:
        # ``letter``: its width over its height.
        return "\n".join(textwrap.wrap(text, int((self._width - 0.3) * 72 / (letter * size))))

    def save(self, file: Path, labels: Iterable[str]) -> Path:
        """Places the words around the panels and writes the file. ``labels``: those of the legend, in order."""
        fig, height = self.figure, self._height
        drawn = {label: h for ax in fig.axes for h, label in zip(*ax.get_legend_handles_labels())}
        handles = {label: drawn[label] for label in labels if label in drawn}
        columns = max(1, min(len(handles), int(self._width / (0.6 + 0.075 * max(map(len, handles))))))
        rows = -(-len(handles) // columns)
        legend = 0.2 * rows + 0.12
        fig.set_figheight(height + legend)
        height += legend
        bottom = self._bottom + legend
        fig.get_layout_engine().set(rect=(0.01, bottom / height, 0.98, 1 - (bottom + self._top) / height))
        fig.legend(
            handles.values(), handles.keys(), loc="lower center", bbox_to_anchor=(0.5, self._bottom / height), ncols=columns,
            fontsize=8.5, frameon=False,
        )  # fmt: skip
        x = 0.15 / self._width
        fig.text(x, 1 - 0.12 / height, self._title, fontsize=12, weight="bold", va="top", linespacing=1.25)
        if self._busy:
            box = dict(boxstyle="round,pad=0.35", facecolor="#fff1f0", edgecolor="#cc0000")
            y = 1 - (self._title_height + 0.06) / height
            fig.text(1.5 * x, y, self._busy, fontsize=9, color="#cc0000", weight="bold", va="top", bbox=box)
        fig.text(x, 0.1 / height, self._foot, fontsize=8, color="#555555", va="bottom", linespacing=1.3)
        fig.savefig(file, dpi=DPI)
        self._plt.close(fig)
        return file


def result_figure(result: dict, title: str, panels: int, *, width: float, notes: list[str]) -> tuple[Figure, list]:
    """A figure of a benchmark's result with panels one below the other, and their axes."""
    words, busy = interference.words(result)
    foot = [f"Lines and bars: medians. Whiskers: quartiles of the rounds. {words[0].upper()}{words[1:]}.", *notes,
            caption(result["header"])]  # fmt: skip
    figure = Figure(title, foot, words if busy else "", width=width, rows=panels)
    axes = figure.figure.subplots(panels, 1, squeeze=False, sharex=True, sharey=True)
    return figure, [ax for (ax,) in axes]


def plain_axis(ax, label: str, title: str = "") -> None:
    """What every panel looks like."""
    ax.set_ylabel(label, fontsize=9)
    ax.set_title(title, fontsize=9.5, loc="left", color="#333333")
    ax.grid(axis="y", color="#d9d9d9", linewidth=0.7, zorder=0)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(labelsize=8.5)


def ratio_axes(axes: list, label: str, titles: list[str]) -> None:
    """The axes of panels that share one scale: logarithmic, of ratios, with plain numbers and a line at 1. Call when all is
    drawn."""
    for ax, title in zip(axes, titles):
        ax.axhline(1.0, color="black", linewidth=1.0, zorder=1)
        ax.set_yscale("log")
        plain_axis(ax, label, title)
    low, high = axes[0].get_ylim()
    low, high = min(low, 0.85), max(high, 1.2)
    suited = next(ticks for span, ticks in TICKS.items() if high / low <= span)
    for ax in axes:
        ticks = [t for t in suited if low <= t <= high]
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_ylim(low, high)

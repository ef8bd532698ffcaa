"""Plots of a result: time over the frozen linear, as lines against M or the number of adapters, and as bars per shape; a
panel for each dropout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core.bench import Bench
from ..core.case import REFERENCES
from ..judge.lora_linear import slow_half
from .figure import colours, quartiles, ratio_axes, result_figure

PASS = "fwd_bwd"
WORDS = {"fwd": "forward", "fwd_bwd": "forward and backward"}
LABELS = {"M": "rows M", "adapters": "adapters in the batch"}
MEANS = "Geometric means over the sizes with that many rows, of those that a provider was timed on."
Series = dict[str, tuple[str, list[dict]]]


@dataclass(frozen=True)
class Drawing:
    """One file. ``slow``: over the frozen fp32 linear; ``x``: the field that lines are drawn against, None for bars of
    each shape."""

    name: str
    title: str
    rows: list[dict]
    slow: bool
    x: str | None
    notes: tuple[str, ...] = ()

    @property
    def ylabel(self) -> str:
        """What is shown."""
        return "time / frozen fp32 linear" if self.slow else "time / frozen linear"


def _key(slow: bool) -> str:
    return "ratio_to_fp32_base" if slow else "ratio_to_base"


def plot(result: dict, bench: Bench, folder: Path) -> list[Path]:
    """Write ``<op>-<name>.png`` for each drawing; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        (_bars if drawing.x is None else _lines)(result, drawing, bench, folder / f"{bench.name}-{drawing.name}.png")
        for drawing in (_many if bench.many else _one)(result, bench)
    ]


def _one(result: dict, bench: Bench) -> list[Drawing]:
    # A training step of each dtype, against rows and per shape.
    found = []
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        rows = [
            r for r in result["rows"] if (r["dtype"], r["pass"]) == (dtype, PASS) and r["provider"] not in REFERENCES
        ]
        slow = slow_half(result["rows"], dtype)
        if all(r[_key(slow)] is None for r in rows):
            continue
        # One rank: not every provider is timed on all, and means over different cases mislead.
        R = min({r["R"] for r in rows}, key=lambda R: abs(R - 16))
        rows = [r for r in rows if r["R"] == R]
        title = (
            f"{bench.name}, {dtype}, rank {R}: a training step over that of a frozen {'fp32 ' if slow else ''}linear"
        )
        title += f" ({dtype}'s own is too slow here)" if slow else ""
        found.append(Drawing(f"{dtype}-rows", title, rows, slow, "M", (MEANS,)))
        found.append(Drawing(f"{dtype}-shapes", title, rows, slow, None))
    return found


def _many(result: dict, bench: Bench) -> list[Drawing]:
    # Every size that was measured with two numbers of adapters or more: rows spread evenly over adapters of one rank,
    # none on the base alone, adapters in the same dtype.
    groups: dict[tuple, list[dict]] = {}
    for r in result["rows"]:
        whole = r["provider"] not in REFERENCES and not bench.providers[r["provider"]].floor
        plain = (r["base_share"], r["ranks"], r["dropout"], r["adapter_dtype"]) == (0.0, "same", 0.0, r["dtype"])
        if whole and plain and r["mix"] in ("distinct", "uniform"):
            groups.setdefault((r["dtype"], r["M"], r["K"], r["N"], r["R"], r["pass"]), []).append(r)
    found = []
    for (dtype, M, K, N, R, which), own in groups.items():
        title = f"{bench.name}, {dtype}, {M} x {K} x {N}, rank {R}, {WORDS[which]}: time over a frozen linear"
        slow = all(r["ratio_to_base"] is None for r in own)
        if len({r["adapters"] for r in own if r[_key(slow)] is not None}) >= 2:
            found.append(Drawing(f"{dtype}-{M}x{K}x{N}-r{R}-{which}", title, own, slow, "adapters"))
    return found


def absent(rows: list[dict], bench: Bench) -> list[str]:
    """What is not drawn, and why: a line for each provider that could not be timed everywhere."""
    lines = []
    for name, provider in bench.providers.items():
        own = [r for r in rows if r["provider"] == name]
        reasons = dict.fromkeys(_short(r["skipped"]) for r in own if r["skipped"])
        if reasons:
            count = sum(bool(r["skipped"]) for r in own)
            where = "" if count == len(own) else f" in {count} of {len(own)} cases"
            lines.append(f"Not drawn: {provider.title}{where}: {'; '.join(reasons)}.")
    return lines


def _short(reason: str) -> str:
    return "too slow to time on this machine" if reason.startswith("hopelessly slow") else reason


def _series(rows: list[dict], bench: Bench) -> Series:
    """Label of the legend: (colour, rows), for each provider, and adapters' dtype where both were measured."""
    both = len({r["adapter_dtype"] for r in rows}) > 1
    present = [n for n in bench.providers if any(r["provider"] == n for r in rows)]
    shades = colours(present)
    series: Series = {}
    for name in present:
        for row in (r for r in rows if r["provider"] == name):
            title = bench.providers[name].title
            label = f"{title}, {row['adapter_dtype']} adapters" if both else title
            series.setdefault(label, (shades[name], []))[1].append(row)
    return series


def _panels(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    return [
        (f"dropout {p:g}", [r for r in rows if r["dropout"] == p])
        for p in sorted({r["dropout"] for r in rows if r["dropout"] is not None})
    ]  # fmt: skip


def _lines(result: dict, drawing: Drawing, bench: Bench, file: Path) -> Path:
    rows, key, at = drawing.rows, _key(drawing.slow), drawing.x
    panels, series = _panels(rows), _series(rows, bench)
    notes = [*drawing.notes, *absent(rows, bench)]
    figure, axes = result_figure(result, drawing.title, len(panels), width=7.5, notes=notes)
    for ax, (_, inside) in zip(axes, panels):
        for label, (colour, own) in series.items():
            by: dict[int, list[dict]] = {}
            for row in own:
                if row in inside and row[key] is not None:
                    by.setdefault(row[at], []).append(row)
            if not by:
                continue
            x, y, below, above = zip(*[(value, *quartiles(of, key)) for value, of in sorted(by.items())])
            # Adapters of a second dtype are dashed.
            ours, dashed = (
                label.startswith("peftkern"),
                own[0]["adapter_dtype"] not in ("fp32", rows[0]["adapter_dtype"]),
            )
            ax.errorbar(
                x, y, (below, above), marker="o", markersize=4.5, label=label, color=colour, capsize=2.5, elinewidth=1,
                linewidth=2.2 if ours else 1.2, linestyle="--" if dashed else "-", zorder=4 if ours else 3,
            )  # fmt: skip
        ax.set_xscale("log", base=2)
        values = sorted({r[at] for r in rows})
        ax.set_xticks(values, [str(value) for value in values])
    ratio_axes(axes, drawing.ylabel, [words for words, _ in panels])
    axes[-1].set_xlabel(LABELS[at], fontsize=9)
    return figure.save(file, series)


def _bars(result: dict, drawing: Drawing, bench: Bench, file: Path) -> Path:
    rows, key = drawing.rows, _key(drawing.slow)
    panels, series = _panels(rows), _series(rows, bench)
    shapes = list(dict.fromkeys((r["M"], r["K"], r["N"]) for r in rows))
    figure, axes = result_figure(
        result, drawing.title, len(panels), width=max(7.5, 1.5 + 1.25 * len(shapes)), notes=absent(rows, bench)
    )
    width = 0.84 / len(series)
    for ax, (_, inside) in zip(axes, panels):
        for j, shape in enumerate(shapes):
            here = [r for r in inside if (r["M"], r["K"], r["N"]) == shape]
            at = {label: own for label, (_, rows) in series.items() if (own := [r for r in rows if r in here])}
            for i, (label, own) in enumerate(at.items()):
                x, colour = j + (i - (len(at) - 1) / 2) * width, series[label][0]
                timed = [r for r in own if r[key] is not None]
                if timed:
                    value, below, above = quartiles(timed, key)
                    # From 1, the frozen linear: what is faster hangs down.
                    hatch = "" if timed[0]["adapter_dtype"] == "fp32" else "///"
                    ax.bar(x, value - 1, width * 0.92, bottom=1, color=colour, label=label, zorder=2, hatch=hatch,
                           edgecolor="white", linewidth=0)  # fmt: skip
                    ax.errorbar(x, value, ((below,), (above,)), color="#222222", elinewidth=0.9, capsize=1.8, zorder=3)
                else:
                    ax.text(x, 1.03, _mark(own), rotation=90, fontsize=7, color=colour, ha="center", va="bottom")
        ax.set_xticks(range(len(shapes)), ["x".join(map(str, s)) for s in shapes], fontsize=8)
        ax.margins(x=0.02)
    ratio_axes(axes, drawing.ylabel, [words for words, _ in panels])
    axes[-1].set_xlabel("M x K x N", fontsize=9)
    return figure.save(file, series)


def _mark(rows: list[dict]) -> str:
    return "too slow" if any((r["skipped"] or "").startswith("hopelessly slow") for r in rows) else "not timed"

"""Plots of a multi_lora_linear result: time over the frozen linear against the number of adapters."""

from __future__ import annotations

from pathlib import Path

from ..core.case import REFERENCES, Bench
from .figure import colours, quartiles, ratio_axes, result_figure
from .plots import absent

WORDS = {"fwd": "forward", "fwd_bwd": "forward and backward"}


def plot(result: dict, bench: Bench, folder: Path) -> list[Path]:
    """Write ``<op>-<dtype>-<M>-<pass>.png`` for every number of rows that was measured with two numbers of adapters or
    more (rows spread evenly over adapters of one rank, none on the base alone); returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        r for r in result["rows"]
        if r["provider"] not in REFERENCES and not bench.providers[r["provider"]].floor
        and (r["base_share"], r["ranks"], r["dropout"]) == (0.0, "same", 0.0) and r["mix"] in ("distinct", "uniform")
    ]  # fmt: skip
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        if r["adapter_dtype"] == r["dtype"]:
            groups.setdefault((r["dtype"], r["M"], r["K"], r["N"], r["R"], r["pass"]), []).append(r)
    files = []
    for (dtype, M, K, N, R, which), own in groups.items():
        slow = all(r["ratio_to_base"] is None for r in own)
        key = "ratio_to_fp32_base" if slow else "ratio_to_base"
        if len({r["adapters"] for r in own if r[key] is not None}) < 2:
            continue
        title = f"{bench.name}, {dtype}, {M} x {K} x {N}, rank {R}, {WORDS[which]}: time over a frozen linear"
        file = folder / f"{bench.name}-{dtype}-{M}x{K}x{N}-r{R}-{which}.png"
        files.append(_draw(result, own, bench, key, title, file))
    return files


def _draw(result: dict, rows: list[dict], bench: Bench, key: str, title: str, file: Path) -> Path:
    present = [n for n in bench.providers if any(r["provider"] == n for r in rows)]
    shades = colours(present)
    figure, axes = result_figure(result, title, 1, width=7.5, notes=absent(rows, bench))
    (ax,) = axes
    for name in present:
        by: dict[int, list[dict]] = {}
        for r in rows:
            if r["provider"] == name and r[key] is not None:
                by.setdefault(r["adapters"], []).append(r)
        if by:
            x, y, below, above = zip(*[(count, *quartiles(of, key)) for count, of in sorted(by.items())])
            ours = name.startswith("peftkern")
            ax.errorbar(
                x, y, (below, above), marker="o", markersize=4.5, label=bench.providers[name].title, color=shades[name],
                capsize=2.5, elinewidth=1, linewidth=2.2 if ours else 1.2, zorder=4 if ours else 3,
            )  # fmt: skip
    ax.set_xscale("log", base=2)
    counts = sorted({r["adapters"] for r in rows})
    ax.set_xticks(counts, [str(n) for n in counts])
    ratio_axes(axes, "time / frozen " + ("fp32 linear" if key == "ratio_to_fp32_base" else "linear"), [""])
    ax.set_xlabel("adapters in the batch", fontsize=9)
    return figure.save(file, [bench.providers[name].title for name in present])

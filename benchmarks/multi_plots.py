"""Plots of a multi_lora_linear result: time over the frozen linear against the number of adapters."""

from __future__ import annotations

from pathlib import Path

from .case import REFERENCES, Bench
from .judge import geomean
from .plots import _finish

WORDS = {"fwd": "forward", "fwd_bwd": "forward + backward"}


def plot(result: dict, bench: Bench, folder: Path) -> list[Path]:
    """Write ``<op>-<dtype>-<M>-<pass>.png`` for every number of rows that was measured with two numbers of adapters or
    more (rows spread evenly over adapters of one rank, none on the base alone); returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        r for r in result["rows"]
        if r["median_ms"] is not None and r["provider"] not in REFERENCES and not bench.providers[r["provider"]].floor
        and (r["base_share"], r["ranks"], r["dropout"]) == (0.0, "same", 0.0) and r["mix"] in ("distinct", "uniform")
    ]  # fmt: skip
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        if r["adapter_dtype"] == r["dtype"]:
            groups.setdefault((r["dtype"], r["M"], r["K"], r["N"], r["R"], r["pass"]), []).append(r)
    files = []
    for (dtype, M, K, N, R, which), own in groups.items():
        if len({r["adapters"] for r in own}) < 2:
            continue
        slow = all(r["ratio_to_base"] is None for r in own)
        key = "ratio_to_fp32_base" if slow else "ratio_to_base"
        title = f"{bench.name} {dtype}, {M} x {K} x {N}, R = {R}, {WORDS[which]}\n{result['header']['device']}"
        file = folder / f"{bench.name}-{dtype}-{M}x{K}x{N}-r{R}-{which}.png"
        _draw(own, bench, key, title, file)
        files.append(file)
    return files


def _draw(rows: list[dict], bench: Bench, key: str, title: str, file: Path) -> None:
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, provider in bench.providers.items():
        by: dict[int, list[float]] = {}
        for r in rows:
            if r["provider"] == name and r[key] is not None:
                by.setdefault(r["adapters"], []).append(r[key])
        if by:
            points = sorted((count, geomean(values)) for count, values in by.items())
            ours = name.startswith("peftkern")
            ax.plot(*zip(*points), marker="o", label=provider.title, linewidth=2.5 if ours else 1.2)
    _finish(ax, "time / frozen " + ("fp32 linear" if key == "ratio_to_fp32_base" else "linear"), title)
    ax.set_xscale("log", base=2)
    counts = sorted({r["adapters"] for r in rows})
    ax.set_xticks(counts, [str(n) for n in counts])
    ax.set_xlabel("adapters in the batch")
    fig.savefig(file, dpi=130)
    plt.close(fig)

"""Markdown of the results of ``bottleneck_adapter``: AdapterHub's order of operations beside ours."""

from __future__ import annotations

from ..core.case import BASE
from . import markdown as md
from .method_times import megabytes, number
from .shares import FLOOR, SHARES, cells, heads

HEAD = [
    "M x H", "R", "matrices", "dropout", "two products, ms", "AdapterHub's order", "**peftkern**", "gain",
    "its order saves, MB", "**peftkern** saves, MB",
]  # fmt: skip


def markdown(rows: list[dict], dtype: str) -> list[str]:
    """Lines for one dtype of h: forward + backward, times over the two products alone."""
    rows, lines, base = [r for r in rows if r["pass"] == "fwd_bwd"], [], None
    more = heads(rows, FLOOR, SHARES)
    pairs: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["provider"] == BASE:
            base = row
        elif row["provider"] in ("eager", "peftkern"):
            key = (f"{row['M']}x{row['K']}", str(row["R"]), row["adapter_dtype"], f"{row['dropout']:g}")
            pairs.setdefault(key, {BASE: base})[row["provider"]] = row
    for key, by in pairs.items():
        eager, ours = by.get("eager"), by.get("peftkern")
        both = eager and ours and eager["median_ms"] and ours["median_ms"]
        lines.append(
            [*key, number(by[BASE], "median_ms"), number(eager, "ratio_to_base"), number(ours, "ratio_to_base"),
             f"{eager['median_ms'] / ours['median_ms']:.2f}x" if both else "-", megabytes(eager), megabytes(ours),
             *cells([ours] if ours else [], more)]
        )  # fmt: skip
    title = (
        f"{dtype}, forward + backward, gelu, both biases: time over the two products alone, whose matrices are frozen"
    )
    return [title, "", *md.table([*HEAD, *more], lines)]

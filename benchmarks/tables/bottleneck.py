"""Markdown of the results of ``bottleneck_adapter``: AdapterHub's order of operations beside ours, with one adapter and with
several."""

from __future__ import annotations

from ..core.case import BASE, REFERENCES
from ..ops.bottleneck_adapter import SEQUENCES, WIDTHS, widths
from . import markdown as md
from .method_times import megabytes, number
from .shares import FLOOR, SHARES, cells, heads

HEAD = [
    "M x H", "R", "matrices", "dropout", "two products, ms", "AdapterHub's order", "**peftkern**", "gain",
    "its order saves, MB", "**peftkern** saves, MB",
]  # fmt: skip
SEVERAL = [
    "M x H", "widths", "", "one adapter of the mean width, ms", "AdapterHub's order, a loop over adapters", "**peftkern**",
    "gain",
]  # fmt: skip


def markdown(rows: list[dict], dtype: str) -> list[str]:
    """Lines for one dtype of h: forward + backward, times over the two products alone; then batches of several adapters."""
    cases: dict[tuple, dict[tuple, dict]] = {}
    bases: dict[tuple, dict] = {}
    more = heads([r for r in rows if r["pass"] == "fwd_bwd"], FLOOR, SHARES)
    for row in rows:
        size = row["M"], row["K"], row["R"]
        if row["provider"] == BASE:
            bases[size, row["pass"]] = row
        elif row["provider"] not in REFERENCES:
            case = cases.setdefault((*size, row["adapter_dtype"], row["dropout"]), {})
            case[row["provider"], row["pass"]] = row
    lines, several = [], []
    for (M, H, R, adapter, dropout), by in cases.items():
        eager, ours, base = by.get(("eager", "fwd_bwd")), by.get(("peftkern", "fwd_bwd")), bases[(M, H, R), "fwd_bwd"]
        lines.append(
            [f"{M}x{H}", str(R), adapter, f"{dropout:g}", number(base, "median_ms"), number(eager, "ratio_to_base"),
             number(ours, "ratio_to_base"), _over(eager, ours, "{:.2f}x"), megabytes(eager), megabytes(ours),
             *cells([ours] if ours else [], more)]
        )  # fmt: skip
        for which, words in md.WORDS.items():
            loop, many, one = (by.get((name, which)) for name in ("loop", "peftkern_many", "peftkern"))
            if many:
                own = widths(R)
                several.append(
                    [f"{M}x{H}", f"{min(own)} to {max(own)}", words, number(one, "median_ms"), _over(loop, one),
                     _over(many, one), _over(loop, many, "{:.2f}x")]
                )  # fmt: skip
    title = (
        f"{dtype}, forward + backward, gelu, both biases: time over the two products alone, whose matrices are frozen"
    )
    found = [title, "", *md.table([*HEAD, *more], lines)]
    if several:
        batch = f"{SEQUENCES} sequences with {len(WIDTHS)} adapters of several widths, matrices in {dtype}"
        found += [f"{dtype}, {batch}: time over one adapter for all, by peftkern", "", *md.table(SEVERAL, several)]
    return found


def _over(row: dict | None, other: dict | None, form: str = "{:.2f}") -> str:
    both = row and other and row["median_ms"] and other["median_ms"]
    return form.format(row["median_ms"] / other["median_ms"]) if both else "-"

"""The tables of a benchmark on the terminal: a line per case, a column per provider, ratios to the frozen linear."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from .case import BASE, FP32_BASE, PASSES, Bench

PASS_TITLES = {"fwd": "forward", "fwd_bwd": "forward + backward"}


def tables(rows: list[dict], bench: Bench) -> list[Table]:
    """One table per dtype and pass."""
    found = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for which in PASSES:
            chosen = [row for row in rows if row["dtype"] == dtype and row["pass"] == which]
            if chosen:
                found.append(_table(chosen, bench, f"{bench.name} {dtype}, {PASS_TITLES[which]}"))
    return found


def _table(rows: list[dict], bench: Bench, title: str) -> Table:
    names = [n for n in bench.providers if n not in (BASE, FP32_BASE) and any(r["provider"] == n for r in rows)]
    bases = {_block(r): r for r in rows if r["provider"] == BASE}
    slow = all(r["median_ms"] is None for r in bases.values())
    yardstick = "ratio_to_fp32_base" if slow else "ratio_to_base"
    over = "the frozen fp32 linear (this dtype's own is skipped as too slow)" if slow else "the frozen linear"
    table = Table(title=f"{title}: times over {over}", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    titles = [bench.providers[name].title.replace(" ", "\n", 1) for name in names]
    for column in ("M x K x N", "R", "adapt.", "drop", "linear\nms", *titles, "floor", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["provider"] not in (BASE, FP32_BASE):
            cases.setdefault((*_block(row), row["adapter_dtype"], row["dropout"]), {})[row["provider"]] = row
    for key, by in cases.items():
        M, K, N, R, adapter, dropout = key
        ms = bases[key[:4]]["median_ms"] if key[:4] in bases else None
        any_row = next(iter(by.values()))
        ours = by.get("peftkern", any_row)
        table.add_row(
            f"{M}x{K}x{N}", str(R), adapter, f"{dropout:g}", "-" if ms is None else f"{ms:.2f}",
            *(_cell(by.get(name), yardstick) for name in names),
            _number(any_row["floor_ratio"], "{:.3f}"), _number(ours["bytes_bound_fraction"], "{:.0%}"),
        )  # fmt: skip
    table.caption = "floor: least possible ratio. bytes: share of peftkern's time that copy bandwidth explains."
    return table


def _block(row: dict) -> tuple:
    return row["M"], row["K"], row["N"], row["R"]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _cell(row: dict | None, yardstick: str) -> Text:
    if row is None:
        return Text("")
    if row["skipped"]:
        slow = row["skipped"].startswith("hopelessly slow")
        return Text("slow" if slow else "none", style="dim" if slow else "red")
    if row[yardstick] is None:
        return Text(f"{row['median_ms']:.2f} ms")
    return Text(f"{row[yardstick]:.3f}", style="bold" if row["provider"] == "peftkern" else "")

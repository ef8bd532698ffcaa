"""The tables of a benchmark on the terminal: a line per case, a column per provider, ratios to the frozen linear.

``±`` is half the distance between the quartiles of the rounds, in per cent of the median.
"""

from __future__ import annotations

from peftkern.screen import Cell, Table

from ..core.case import BASE, FP32_BASE, PASSES, Bench

SPREAD = "±: half the distance between the quartiles of the rounds."
NOTES = "floor: least possible ratio. bytes: share of peftkern's time that copy bandwidth explains."
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
    titles = [bench.providers[name].title.replace(" ", "\n", 1) for name in names]
    columns = ("M x K x N", "R", "adapt.", "drop", "linear\nms", *titles, "floor", "bytes")
    table = Table(f"{title}: times over {over}", columns, caption=f"{SPREAD} {NOTES}")
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["provider"] not in (BASE, FP32_BASE):
            cases.setdefault((*_block(row), row["adapter_dtype"], row["dropout"]), {})[row["provider"]] = row
    for key, by in cases.items():
        M, K, N, R, adapter, dropout = key
        any_row = next(iter(by.values()))
        ours = by.get("peftkern", any_row)
        table.add(
            f"{M}x{K}x{N}", R, adapter, f"{dropout:g}", milliseconds(bases.get(key[:4]), "{:.2f}"),
            *(cell(by.get(name), yardstick) for name in names),
            number(any_row["floor_ratio"], "{:.3f}"), number(ours["bytes_bound_fraction"], "{:.0%}"),
        )  # fmt: skip
    return table


def _block(row: dict) -> tuple:
    return row["M"], row["K"], row["N"], row["R"]


def number(value: float | None, form: str) -> str:
    """A number, or a dash for none."""
    return "-" if value is None else form.format(value)


def spread(row: dict) -> str:
    """`` ±3%``; empty where there were no rounds to tell from."""
    low, high = row.get("p25_ms"), row.get("p75_ms")
    return "" if low is None or high is None else f" ±{(high - low) / 2 / row['median_ms']:.0%}"


def milliseconds(row: dict | None, form: str) -> str:
    """The median of a row, in ms, and its spread."""
    return "-" if row is None or row["median_ms"] is None else form.format(row["median_ms"]) + spread(row)


def cell(row: dict | None, yardstick: str) -> Cell:
    """The ratio of a row and its spread, or the reason for none in a word."""
    if row is None:
        return Cell("")
    if row["skipped"]:
        slow = row["skipped"].startswith("hopelessly slow")
        return Cell("slow" if slow else "none", "dim" if slow else "red")
    if row[yardstick] is None:
        return Cell(f"{milliseconds(row, '{:.2f} ms')}")
    return Cell(f"{row[yardstick]:.3f}{spread(row)}", "bold" if row["provider"].startswith("peftkern") else "")

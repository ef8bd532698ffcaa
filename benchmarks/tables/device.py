"""The tables of a GPU's results on the terminal: a line per provider, a column per size, for each layer and pass."""

from __future__ import annotations

from peftkern.screen import Cell, Table

from ..core.bench import Bench
from ..core.case import BASE, COPY, PASSES
from .shares import SHARES, shares
from .terminal import PASS_TITLES, SPREAD, milliseconds, spread

# What one table has in common.
COMMON = ("dtype", "K", "N", "R", "adapters", "mix", "phase")


def tables(rows: list[dict], bench: Bench) -> list[Table]:
    """One table per layer, rank, population, adapter dtype and pass."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in COMMON), []).append(row)
    found = []
    for own in groups.values():
        for kind in dict.fromkeys(r["adapter_dtype"] for r in own if r["adapter_dtype"]):
            for which in PASSES:
                chosen = [r for r in own if r["adapter_dtype"] in (None, kind) and r["pass"] == which]
                found += [_table(chosen, bench, kind, which)] if chosen else []
    return found


def _table(rows: list[dict], bench: Bench, kind: str, which: str) -> Table:
    first = rows[0]
    many = f", {first['adapters']} adapters, {first['mix']}" if first.get("adapters") else ""
    phase = "decoding" if first.get("phase") == "decode" else PASS_TITLES[which]
    title = f"{bench.name} {first['dtype']}, M x {first['K']} x {first['N']}, R = {first['R']}{many}, {kind} adapters, "
    sizes = sorted({(r["M"], r["dropout"]) for r in rows if r["dropout"] is not None}, key=lambda c: (-c[0], c[1]))
    drops = any(dropout for _, dropout in sizes)
    heads = [f"M {M}" + (f"\ndrop {dropout:g}" if drops else "") for M, dropout in sizes]
    table = Table(title + phase, ("", *heads, "launches", "MiB", SHARES.replace(", ", "\n")), left=("",))
    notes = []
    for name, provider in bench.providers.items():
        mine = [r for r in rows if r["provider"] == name]
        if not mine:
            continue
        at = {(r["M"], r["dropout"]): r for r in mine}
        cells = [_cell(at.get(size) or at.get((size[0], None))) for size in sizes]
        last = next((r for r in mine if r["median_ms"] is not None), mine[0])
        table.add(
            provider.title, *cells, _number(last.get("launches"), "{}"), _number(_mib(last), "{:.0f}"),
            shares([last]),
        )  # fmt: skip
        notes += [f"{provider.title}: {r['skipped']}" for r in mine if r["skipped"]]
        notes += [f"{provider.title}: not in a graph: {r['no_graph']}" for r in mine if r.get("no_graph")]
    lines = [SPREAD, "times over the frozen linear, whose own are in ms; launches, peak MiB, and the shares of the time that "
             "FLOPs at the product's best and bytes at copy speed explain, of the first size", *dict.fromkeys(notes)]  # fmt: skip
    table.caption = "\n".join(lines)
    return table


def _mib(row: dict) -> float | None:
    return None if row.get("peak_bytes") is None else row["peak_bytes"] / 2**20


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _cell(row: dict | None) -> Cell:
    if row is None:
        return Cell("")
    if row["median_ms"] is None:
        return Cell("none", "dim")
    if row["provider"] in (BASE, COPY) or row["ratio_to_base"] is None:
        return Cell(milliseconds(row, "{:.3f} ms"))
    style = "bold" if row["provider"].startswith("peftkern") else ""
    return Cell(f"{row['ratio_to_base']:.3f}{spread(row)}", style)

"""The tables of a benchmark with many adapters on the terminal: the whole layer, and the branch alone."""

from __future__ import annotations

from peftkern.screen import Table

from ..core.case import BASE, COPY, FP32_BASE, OWN_BASE, PASSES, REFERENCES, Bench
from .terminal import PASS_TITLES, SPREAD, cell, milliseconds, number

FIRST = ("M", "R", "adapters", "base\nrows")
KEY = ("M", "R", "adapters", "mix", "base_share", "ranks")


def tables(rows: list[dict], bench: Bench) -> list[Table]:
    """For each layer and dtype: decoding, forward, and forward + backward, and the branch alone."""
    found = []
    for dtype, K, N in dict.fromkeys((row["dtype"], row["K"], row["N"]) for row in rows):
        own = [row for row in rows if (row["dtype"], row["K"], row["N"]) == (dtype, K, N)]
        for phase, which in (("decode", "fwd"), *(("training", which) for which in PASSES)):
            chosen = [row for row in own if (row["phase"], row["pass"]) == (phase, which)]
            title = f"{bench.name} {dtype}, M x {K} x {N}, {'decoding' if phase == 'decode' else PASS_TITLES[which]}"
            whole = [row for row in chosen if not bench.providers[row["provider"]].floor]
            branch = [row for row in chosen if bench.providers[row["provider"]].floor and row["provider"] != COPY]
            found += [_layer(whole, bench, title)] if whole else []
            found += [_branch(branch, bench, f"{title}, the branch alone")] if branch else []
    return found


def _labels(key: tuple) -> list[str]:
    M, R, adapters, mix, base_share, ranks = key
    return [str(M), ("<=" if ranks == "mixed" else "") + str(R), f"{adapters} {mix}", f"{base_share:.0%}"]


def _layer(rows: list[dict], bench: Bench, title: str) -> Table:
    bases: dict[tuple, dict[str, dict]] = {}
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = tuple(row[name] for name in KEY)
        if row["provider"] in REFERENCES:
            bases.setdefault(key, {})[row["provider"]] = row
        else:
            cases.setdefault((key, row["adapter_dtype"], row["dropout"]), {})[row["provider"]] = row
    slow = all(by[BASE]["median_ms"] is None for by in bases.values() if BASE in by)
    yardstick = "ratio_to_fp32_base" if slow else "ratio_to_base"
    over = "the frozen fp32 linear (this dtype's own is skipped as too slow)" if slow else "the frozen linear"
    names = [n for n in bench.providers if n not in REFERENCES and any(n in by for by in cases.values())]
    drops = any(dropout for _, _, dropout in cases)
    titles = [bench.providers[name].title.replace(" ", "\n") for name in names]
    columns = (*FIRST, "adapt.", *(["drop"] if drops else []), "linear\nms", "own\nbase", *titles, "floor")
    notes = f"{SPREAD} own base: peftkern's own base product alone. floor: least possible ratio."
    table = Table(f"{title}: times over {over}", columns, caption=notes)
    for (key, adapter, dropout), by in cases.items():
        base = bases.get(key, {})
        floor = next(iter(by.values()))["floor_ratio"]
        table.add(
            *_labels(key), adapter, *([f"{dropout:g}"] if drops else []),
            milliseconds(base.get(FP32_BASE if slow else BASE), "{:.2f}"), cell(base.get(OWN_BASE), yardstick),
            *(cell(by.get(name), yardstick) for name in names), number(floor, "{:.3f}"),
        )  # fmt: skip
    return table


def _branch(rows: list[dict], bench: Bench, title: str) -> Table:
    names = [name for name in bench.providers if any(row["provider"] == name for row in rows)]
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((tuple(row[name] for name in KEY), row["adapter_dtype"]), {})[row["provider"]] = row
    columns = (*FIRST, "adapt.", *(bench.providers[name].title for name in names), "copy\nGB/s", "bytes")
    notes = f"{SPREAD} bytes: share of sgmv's time that copying the adapters in use, x and y explains."
    table = Table(f"{title}: ms", columns, caption=notes)
    for (key, adapter), by in cases.items():
        ours = by.get("sgmv", next(iter(by.values())))
        table.add(
            *_labels(key), adapter, *("" if name not in by else milliseconds(by[name], "{:.3f}") for name in names),
            f"{ours['copy_gb_per_s']:.1f}", number(ours["bytes_bound_fraction"], "{:.0%}"),
        )  # fmt: skip
    return table

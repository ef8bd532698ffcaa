"""The tables of a benchmark on the terminal: a line per case, a column per provider, ratios to the frozen linear.

With many adapters there is a set of tables for each layer, and the branch alone has tables of its own, in milliseconds.
``±`` is half the distance between the quartiles of the rounds, in per cent of the median.
"""

from __future__ import annotations

from peftkern.screen import Cell, Table

from ..core.bench import Bench
from ..core.case import BASE, COPY, FP32_BASE, OWN_BASE, PASSES, REFERENCES
from .shares import FLOOR, NOTE, SHARES, floor, share, shares

SPREAD = "±: half the distance between the quartiles of the rounds."
PASS_TITLES = {"fwd": "forward", "fwd_bwd": "forward + backward"}
# The tables of a layer, in order: phase (None with one adapter) and pass.
PARTS = ((None, "fwd"), (None, "fwd_bwd"), ("decode", "fwd"), *(("training", which) for which in PASSES))
BLOCK = ("M", "K", "N", "R", "adapters", "mix", "base_share", "ranks")
HEADS = {False: ("M x K x N", "R"), True: ("M", "R", "adapters", "base\nrows")}


def tables(rows: list[dict], bench: Bench) -> list[Table]:
    """One table per dtype, layer, phase and pass."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], *((row["K"], row["N"]) if bench.many else ())), []).append(row)
    found = []
    for (dtype, *layer), own in groups.items():
        for phase, which in PARTS:
            chosen = [r for r in own if (r.get("phase"), r["pass"]) == (phase, which)]
            where = f"{dtype}, M x {layer[0]} x {layer[1]}" if layer else dtype
            title = f"{bench.name} {where}, {'decoding' if phase == 'decode' else PASS_TITLES[which]}"
            whole = [r for r in chosen if not bench.providers[r["provider"]].floor]
            branch = [r for r in chosen if bench.providers[r["provider"]].floor and r["provider"] != COPY]
            found += [_layer(whole, bench, title)] if whole else []
            found += [_branch(branch, bench, f"{title}, the branch alone")] if branch else []
    return found


def _block(row: dict) -> tuple:
    return tuple(row.get(name) for name in BLOCK)


def _labels(block: tuple) -> list[str]:
    M, K, N, R, adapters, mix, base_share, ranks = block
    if adapters is None:
        return [f"{M}x{K}x{N}", str(R)]
    return [str(M), ("<=" if ranks == "mixed" else "") + str(R), f"{adapters} {mix}", f"{base_share:.0%}"]


def _layer(rows: list[dict], bench: Bench, title: str) -> Table:
    bases: dict[tuple, dict[str, dict]] = {}
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["provider"] in REFERENCES:
            bases.setdefault(_block(row), {})[row["provider"]] = row
        else:
            cases.setdefault((_block(row), row["adapter_dtype"], row["dropout"]), {})[row["provider"]] = row
    slow = all(by[BASE]["median_ms"] is None for by in bases.values() if BASE in by)
    yardstick = "ratio_to_fp32_base" if slow else "ratio_to_base"
    over = "the frozen fp32 linear (this dtype's own is skipped as too slow)" if slow else "the frozen linear"
    names = [n for n in bench.providers if n not in REFERENCES and any(n in by for by in cases.values())]
    # What not every op has: its own base product, and dropouts.
    own = OWN_BASE in bench.providers
    drops = not bench.many or any(dropout for _, _, dropout in cases)
    columns = (
        *HEADS[bench.many], "adapt.", *["drop"] * drops, "linear\nms", *["own\nbase"] * own,
        *(bench.providers[name].title.replace(" ", "\n") for name in names), FLOOR, SHARES.replace(", ", "\n"),
    )  # fmt: skip
    notes = [SPREAD, *["own base: peftkern's own base product alone."] * own, NOTE]
    table = Table(f"{title}: times over {over}", columns, caption=" ".join(notes))
    for (block, adapter, dropout), by in cases.items():
        base, any_row = bases.get(block, {}), next(iter(by.values()))
        table.add(
            *_labels(block), adapter, *[f"{dropout:g}"] * drops,
            _milliseconds(base.get(FP32_BASE if slow else BASE), "{:.2f}"),
            *[_cell(base.get(OWN_BASE), yardstick)] * own, *(_cell(by.get(name), yardstick) for name in names),
            floor([any_row]), shares([by.get("peftkern", any_row)]),
        )  # fmt: skip
    return table


def _branch(rows: list[dict], bench: Bench, title: str) -> Table:
    names = [name for name in bench.providers if any(row["provider"] == name for row in rows)]
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((_block(row), row["adapter_dtype"]), {})[row["provider"]] = row
    listed = "sgmv_list" in names and "sgmv" in names
    columns = (
        *HEADS[True], "adapt.", *(bench.providers[name].title for name in names), "copy\nGB/s", "of copy",
        *["list\nof copy"] * listed,
    )  # fmt: skip
    notes = f"{SPREAD} of copy: share of sgmv's time that copying the adapters in use, x and y explains."
    table = Table(f"{title}: ms", columns, caption=notes)
    for (block, adapter), by in cases.items():
        ours = by.get("sgmv", next(iter(by.values())))
        table.add(
            *_labels(block), adapter, *("" if n not in by else _milliseconds(by[n], "{:.3f}") for n in names),
            f"{ours['copy_gb_per_s']:.1f}", share([ours], "bytes_bound_fraction"),
            *[share([by["sgmv_list"]] if "sgmv_list" in by else [], "bytes_bound_fraction")] * listed,
        )  # fmt: skip
    return table


def spread(row: dict) -> str:
    """`` ±3%``; empty where there were no rounds to tell from."""
    low, high = row.get("p25_ms"), row.get("p75_ms")
    return "" if low is None or high is None else f" ±{(high - low) / 2 / row['median_ms']:.0%}"


def milliseconds(row: dict, form: str) -> str:
    """The median of a row that was timed, in ms, and its spread."""
    return form.format(row["median_ms"]) + spread(row)


def _milliseconds(row: dict | None, form: str) -> str:
    return "-" if row is None or row["median_ms"] is None else milliseconds(row, form)


def _cell(row: dict | None, yardstick: str) -> Cell:
    # The ratio of a row and its spread, or the reason for none in a word.
    if row is None:
        return Cell("")
    if row["skipped"]:
        slow = row["skipped"].startswith("hopelessly slow")
        return Cell("slow" if slow else "none", "dim" if slow else "red")
    if row[yardstick] is None:
        return Cell(_milliseconds(row, "{:.2f} ms"))
    return Cell(f"{row[yardstick]:.3f}{spread(row)}", "bold" if row["provider"].startswith("peftkern") else "")

"""Judged numbers, and the arithmetic on the rows of a result that they are made with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

OURS, ADDMM, PEFT, BASE = "peftkern", "addmm", "peft", "base"
# What identifies a case and pass, the provider apart.
KEY = ("op", "device", "dtype", "adapter_dtype", "M", "K", "N", "R", "dropout", "pass")


@dataclass(frozen=True)
class Figure:
    """One judged number. ``ok`` is None where nothing was measured."""

    name: str
    value: float | None
    limit: str
    ok: bool | None
    note: str = ""


def most(name: str, value: float | None, limit: float, note: str = "") -> Figure:
    """A figure with an upper limit."""
    return Figure(name, value, f"<= {limit:g}", None if value is None else value <= limit, note)


def least(name: str, value: float | None, limit: float, note: str = "") -> Figure:
    """A figure with a lower limit."""
    return Figure(name, value, f">= {limit:g}", None if value is None else value >= limit, note)


def missed(found: Iterable[Figure]) -> list[str]:
    """Markdown lines of the limits that were missed, for documents."""
    lines = [f"- {f.name}: {f.value:.3f} (limit {f.limit})" for f in found if f.ok is False]
    return ["Limits that this result misses:", "", *lines, ""] if lines else ["This result is within all limits.", ""]


def told(name: str, value: float | None, note: str = "") -> Figure:
    """A figure without a limit."""
    return Figure(name, value, "told", None, note)


def on_gpu(result: dict) -> bool:
    """Whether a GPU was measured."""
    return any(row.get("device") == "cuda" for row in result["rows"])


def at_most_avx2(result: dict) -> bool:
    """Whether a CPU with AVX2 and nothing wider was measured: a class of machines with limits of its own."""
    features = result["header"]["cpu"]["features"]
    return "avx2" in features and "avx512f" not in features


def geomean(values: Iterable[float]) -> float | None:
    """Geometric mean, None of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def mean(rows: Iterable[dict], field: str) -> float | None:
    """Geometric mean of a field, of the rows that have it."""
    return geomean(value for r in rows if (value := r.get(field)) is not None)


def times(rows: Iterable[dict], provider: str) -> dict[tuple, float]:
    """Median milliseconds of a provider's measured rows, by KEY."""
    mine = (r for r in rows if r["provider"] == provider and r["median_ms"] is not None)
    return {tuple(r[name] for name in KEY): r["median_ms"] for r in mine}


def ratios(rows: Iterable[dict], provider: str, over: str) -> dict[tuple, float]:
    """A provider's time over another's, by KEY, where both were measured."""
    rows = list(rows)
    mine, theirs = times(rows, provider), times(rows, over)
    return {k: mine[k] / theirs[k] for k in mine if k in theirs}

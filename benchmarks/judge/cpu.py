"""Whether a result keeps the limits that peftkern sets itself on CPU. Pure arithmetic on the rows of a JSON file.

Unless said otherwise: geometric means over fp32 adapters, forward + backward, M >= 512, R in {8, 16}. The limits of a
half-precision dtype depend on whether the vendor's own product is fast here, which the rows themselves tell: slow is
where the frozen linear of the dtype was skipped or takes longer than the fp32 one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

OURS, ADDMM, PEFT, BASE = "peftkern", "addmm", "peft", "base"
# Ranks that tables and limits speak of.
RANKS = (8, 16)
RERUN_ABOVE = 1.05
MEAN_ABOVE_ADDMM = 1.03
KEY = ("op", "device", "dtype", "adapter_dtype", "M", "K", "N", "R", "dropout", "pass")


@dataclass(frozen=True)
class Figure:
    """One judged number. ``ok`` is None where nothing was measured."""

    name: str
    value: float | None
    limit: str
    ok: bool | None
    note: str = ""


def geomean(values: Iterable[float]) -> float | None:
    """Geometric mean, None of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def key(row: dict) -> tuple:
    """What identifies a case and pass, the provider apart."""
    return tuple(row[name] for name in KEY)


def times(rows: list[dict], provider: str) -> dict[tuple, float]:
    """Median milliseconds of a provider's measured rows by ``key``."""
    return {key(r): r["median_ms"] for r in rows if r["provider"] == provider and r["median_ms"] is not None}


def against_addmm(rows: list[dict], which: str = "fwd_bwd") -> dict[tuple, float]:
    """Our time over the addmm_ function's, by ``key``."""
    ours, theirs = times(rows, OURS), times(rows, ADDMM)
    return {k: ours[k] / theirs[k] for k in ours if k in theirs and k[-1] == which}


def judged_against_addmm(result: dict) -> dict[tuple, float]:
    """The same, with the median of the reruns where a row was run again."""
    again = {tuple(r[name] for name in KEY): r["median"] for r in result.get("reruns", [])}
    return {k: again.get(k, ratio) for k, ratio in against_addmm(result["rows"]).items()}


def slow_half(rows: list[dict], dtype: str) -> bool:
    """Whether the vendor's own product is slow in this dtype."""
    if dtype == "fp32" or any(r["device"] == "cuda" for r in rows):
        return False
    many = [r for r in rows if r["dtype"] == dtype and r["pass"] == "fwd_bwd" and r["M"] >= 64]
    base = [r for r in many if r["provider"] == BASE]
    ratios = [r["ratio_to_fp32_base"] for r in base if r["ratio_to_fp32_base"] is not None]
    return len(ratios) < len(base) or (geomean(ratios) or 0.0) > 1.0


def figures(result: dict) -> list[Figure]:
    """Every figure that the rows allow, dtype by dtype."""
    rows, found = result["rows"], []
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        own = [r for r in rows if r["dtype"] == dtype]
        found += _slow(own, dtype) if slow_half(own, dtype) else _fast(own, dtype)
    return found + _addmm(result)


def _core(row: dict) -> bool:
    return row["adapter_dtype"] == "fp32" and row["pass"] == "fwd_bwd" and row["M"] >= 512 and row["R"] in RANKS


def _mean(rows: list[dict], field: str, dropout: float | None = None, chosen: Callable[[dict], bool] = _core):
    values = [
        r[field] for r in rows
        if r["provider"] == OURS and chosen(r) and r[field] is not None and dropout in (None, r["dropout"])
    ]  # fmt: skip
    return geomean(values), len(values)


def _most(name: str, value: float | None, limit: float, note: str = "") -> Figure:
    return Figure(name, value, f"<= {limit:g}", None if value is None else value <= limit, note)


def _least(name: str, value: float | None, limit: float, note: str = "") -> Figure:
    return Figure(name, value, f">= {limit:g}", None if value is None else value >= limit, note)


def _told(name: str, value: float | None, note: str = "") -> Figure:
    return Figure(name, value, "told", None, note)


def _over(rows: list[dict], field: str, title: str, limit: float) -> list[Figure]:
    mean, count = _mean(rows, field)
    found = [_most(title, mean, limit, f"{count} rows")]
    for dropout in sorted({r["dropout"] for r in rows if r["provider"] == OURS and _core(r)}):
        found.append(_told(f"{title}, dropout {dropout:g}", *_text(_mean(rows, field, dropout))))
    wide = _mean(rows, field, chosen=lambda r: _core(r | {"R": 8}) and r["R"] == 64)
    floor = _mean(rows, "floor_ratio", chosen=lambda r: _core(r | {"R": 8}) and r["R"] == 64)[0]
    if wide[1]:
        found.append(_told(f"{title}, R = 64", wide[0], f"floor {floor:.3f}"))
    return found


def _text(pair: tuple[float | None, int]) -> tuple[float | None, str]:
    return pair[0], f"{pair[1]} rows"


def _speed_up(rows: list[dict], chosen: Callable[[dict], bool] = _core) -> tuple[float | None, int]:
    ours = times([r for r in rows if chosen(r)], OURS)
    theirs = times([r for r in rows if chosen(r)], PEFT)
    values = [theirs[k] / ours[k] for k in ours if k in theirs]
    return geomean(values), len(values)


def _fast(rows: list[dict], dtype: str) -> list[Figure]:
    limit, faster = (1.10, 1.08) if dtype == "fp32" else (1.25, 2.2)
    mean, count = _speed_up(rows)
    return [
        *_over(rows, "ratio_to_base", f"{dtype}: over a frozen linear", limit),
        _least(f"{dtype}: faster than PEFT as users run it", mean, faster, f"{count} rows"),
    ]


def _slow(rows: list[dict], dtype: str) -> list[Figure]:
    def small(row: dict) -> bool:
        return (row["M"], row["K"], row["N"]) == (192, 768, 1024) and row["adapter_dtype"] == "fp32"

    slow = f"{dtype} (slow here)"
    fwd = [r for r in rows if r["pass"] == "fwd" and r["adapter_dtype"] in ("fp32", None)]
    base = {(r["M"], r["K"], r["N"], r["R"]): r["median_ms"] for r in fwd if r["provider"] == BASE and r["median_ms"]}
    few = [
        base[k] / r["median_ms"] for r in fwd
        if r["provider"] == OURS and r["M"] == 16 and r["median_ms"] and (k := (r["M"], r["K"], r["N"], r["R"])) in base
    ]  # fmt: skip
    bandwidth = [r["bytes_bound_fraction"] for r in fwd if r["provider"] == OURS and r["M"] <= 4 and r["median_ms"]]
    mean, count = _speed_up(rows, lambda r: small(r) and r["pass"] == "fwd_bwd")
    return [
        *_over(rows, "ratio_to_fp32_base", f"{slow}: over a frozen fp32 linear", 1.20),
        _least(f"{slow}: faster than PEFT at (192, 768, 1024)", mean, 30.0, f"{count} rows"),
        _least(f"{slow}: forward at M = 16, torch's own linear over ours", geomean(few), 5.0, f"{len(few)} rows"),
        _least(
            f"{slow}: forward at M <= 4, share of copy bandwidth", geomean(bandwidth), 0.7, f"{len(bandwidth)} rows"
        ),
    ]


def _addmm(result: dict) -> list[Figure]:
    judged = judged_against_addmm(result)
    shapes: dict[tuple, list[float]] = {}
    for k, ratio in judged.items():
        shapes.setdefault((k[2], k[4], k[5], k[6]), []).append(ratio)
    found = []
    for (dtype, M, K, N), ratios in shapes.items():
        found.append(_most(f"{dtype} {M}x{K}x{N}: over the addmm_ function", geomean(ratios), MEAN_ABOVE_ADDMM,
                           f"worst row {max(ratios):.3f}"))  # fmt: skip
    worst = max(judged, key=judged.get, default=None)
    again = {tuple(r[name] for name in KEY) for r in result.get("reruns", [])}
    pending = sum(ratio > RERUN_ABOVE and k not in again for k, ratio in judged.items())
    note = f"{worst}; " if worst else ""
    note += f"{pending} rows over 5 % not run again: bench --rerun" if pending else f"{len(again)} rows run again"
    found.append(_most("worst row over the addmm_ function", judged.get(worst), RERUN_ABOVE, note))
    return found

"""The limits that peftkern sets itself for lora_linear. Pure arithmetic on the rows of a JSON file.

On a CPU, unless said otherwise: geometric means over fp32 adapters, forward + backward, M >= 512, R in {8, 16}. A CPU with
AVX2 and nothing wider has limits of its own. Those of a half-precision dtype depend on whether the vendor's own product is
fast here, which the rows themselves tell: slow is where the frozen linear of the dtype was skipped or takes longer than the
fp32 one.

On a GPU: bf16, 8192 rows, 4096 x 4096 and 4096 x 14336, R = 16, fp32 adapters, dropout 0.1, each shape by itself:
forward at most 1.05 and forward + backward at most 1.08 of the frozen linear, forward + backward at least 1.6 times as fast
as HF PEFT; and no row slower than the addmm_ function, up to noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .figures import (
    ADDMM,
    BASE,
    KEY,
    OURS,
    PEFT,
    Figure,
    at_most_avx2,
    geomean,
    least,
    mean,
    most,
    on_gpu,
    ratios,
    told,
)


class Limits(NamedTuple):
    """``over``: fp32 over a frozen linear; ``faster``: than PEFT; ``slow_half``: half precision over a frozen fp32 linear."""

    over: float
    faster: float
    slow_half: float


AVX2, WIDER = Limits(0.98, 1.25, 1.02), Limits(1.10, 1.08, 1.20)
# Of the peak.
AIM = 0.85

# Ranks that tables and limits speak of.
RANKS = (8, 16)
RERUN_ABOVE = 1.05
MEAN_ABOVE_ADDMM = 1.03
# On a GPU.
SHAPES = ((8192, 4096, 4096), (8192, 4096, 14336))
FORWARD, BOTH, FASTER = 1.05, 1.08, 1.6
AIMS = {"fwd": 1.02, "fwd_bwd": 1.05}
# Medians of interleaved samples repeat to about this.
NOISE = 1.03


def figures(result: dict) -> list[Figure]:
    """Every figure that the rows allow: on a CPU dtype by dtype."""
    rows, found = result["rows"], []
    if on_gpu(result):
        return _gpu([r for r in rows if r["device"] == "cuda"])
    limits = AVX2 if at_most_avx2(result) else WIDER
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        own = [r for r in rows if r["dtype"] == dtype]
        found += _slow(own, dtype, limits) if slow_half(own, dtype) else _fast(own, dtype, limits)
    return found + _addmm(result)


def against_addmm(rows: Iterable[dict]) -> dict[tuple, float]:
    """Our time over the addmm_ function's, forward + backward, by KEY."""
    return ratios((r for r in rows if r["pass"] == "fwd_bwd"), OURS, ADDMM)


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
    over = [r["ratio_to_fp32_base"] for r in base if r["ratio_to_fp32_base"] is not None]
    return len(over) < len(base) or (geomean(over) or 0.0) > 1.0


def _of(row: dict, ranks: tuple[int, ...] = RANKS) -> bool:
    return row["adapter_dtype"] == "fp32" and row["pass"] == "fwd_bwd" and row["M"] >= 512 and row["R"] in ranks


def _mean(rows: Iterable[dict], field: str) -> tuple[float | None, str]:
    mine = [r for r in rows if r["provider"] == OURS and r.get(field) is not None]
    return mean(mine, field), f"{len(mine)} rows"


def _over(rows: list[dict], field: str, title: str, limit: float) -> list[Figure]:
    core, wide = [r for r in rows if _of(r)], [r for r in rows if _of(r, (64,))]
    value, count = _mean(core, field)
    found = [most(title, value, limit, count)]
    for dropout in sorted({r["dropout"] for r in core if r["provider"] == OURS}):
        found.append(told(f"{title}, dropout {dropout:g}", *_mean([r for r in core if r["dropout"] == dropout], field)))
    value = _mean(wide, field)[0]
    if value is not None:
        found.append(told(f"{title}, R = 64", value))
    share, count = _mean(core, "flops_bound_fraction")
    if share is not None:
        found.append(told(f"{title}: share of the peak", share, f"{count}, aim {AIM:g}"))
    return found


def _faster(name: str, rows: Iterable[dict], limit: float) -> Figure:
    over = ratios(rows, PEFT, OURS)
    return least(name, geomean(over.values()), limit, f"{len(over)} rows")


def _fast(rows: list[dict], dtype: str, limits: Limits) -> list[Figure]:
    limit, faster = (limits.over, limits.faster) if dtype == "fp32" else (1.25, 2.2)
    return [
        *_over(rows, "ratio_to_base", f"{dtype}: over a frozen linear", limit),
        _faster(f"{dtype}: faster than PEFT as users run it", filter(_of, rows), faster),
    ]


def _slow(rows: list[dict], dtype: str, limits: Limits) -> list[Figure]:
    slow, fp32 = f"{dtype} (slow here)", [r for r in rows if r["adapter_dtype"] == "fp32"]
    small = [r for r in fp32 if (r["M"], r["K"], r["N"]) == (192, 768, 1024) and r["pass"] == "fwd_bwd"]
    fwd = [r for r in rows if r["pass"] == "fwd" and r["adapter_dtype"] in ("fp32", None) and r["median_ms"]]
    base = {(r["K"], r["N"], r["R"]): r["median_ms"] for r in fwd if (r["provider"], r["M"]) == (BASE, 16)}
    few = [
        base[k] / r["median_ms"] for r in fwd
        if (r["provider"], r["M"]) == (OURS, 16) and (k := (r["K"], r["N"], r["R"])) in base
    ]  # fmt: skip
    bandwidth, count = _mean((r for r in fwd if r["M"] <= 4), "bytes_bound_fraction")
    return [
        *_over(rows, "ratio_to_fp32_base", f"{slow}: over a frozen fp32 linear", limits.slow_half),
        _faster(f"{slow}: faster than PEFT at (192, 768, 1024)", small, 30.0),
        least(f"{slow}: forward at M = 16, torch's own linear over ours", geomean(few), 5.0, f"{len(few)} rows"),
        least(f"{slow}: forward at M <= 4, share of copy bandwidth", bandwidth, 0.7, count),
    ]


def _addmm(result: dict) -> list[Figure]:
    judged = judged_against_addmm(result)
    shapes: dict[tuple, list[float]] = {}
    for k, ratio in judged.items():
        shapes.setdefault((k[2], k[4], k[5], k[6]), []).append(ratio)
    found = [
        most(f"{dtype} {M}x{K}x{N}: over the addmm_ function", geomean(over), MEAN_ABOVE_ADDMM,
             f"worst row {max(over):.3f}")
        for (dtype, M, K, N), over in shapes.items()
    ]  # fmt: skip
    worst = max(judged, key=judged.get, default=None)
    again = {tuple(r[name] for name in KEY) for r in result.get("reruns", [])}
    pending = sum(ratio > RERUN_ABOVE and k not in again for k, ratio in judged.items())
    note = f"{worst}; " if worst else ""
    note += f"{pending} rows over 5 % not run again: bench --rerun" if pending else f"{len(again)} rows run again"
    return [*found, most("worst row over the addmm_ function", judged.get(worst), RERUN_ABOVE, note)]


def _gpu(rows: list[dict]) -> list[Figure]:
    found = []
    for shape in SHAPES:
        name = "bf16 " + "x".join(map(str, shape))
        own = [
            r for r in rows
            if (r["dtype"], r["M"], r["K"], r["N"], r["R"]) == ("bf16", *shape, 16)
            and r["adapter_dtype"] in (None, "fp32") and r["dropout"] in (None, 0.1)
        ]  # fmt: skip
        for which, words, limit in (("fwd", "forward", FORWARD), ("fwd_bwd", "forward + backward", BOTH)):
            mine = [r for r in own if r["provider"] == OURS and r["pass"] == which]
            graph = ", in a CUDA graph" if mine and all(r.get("graph") for r in mine) else ""
            title, note = f"{name}: {words} over the frozen linear", f"aim {AIMS[which]:g}{graph}"
            found.append(most(title, mean(mine, "ratio_to_base"), limit, note))
            # The ways that were forced, so that a wrong choice of the automatic one shows.
            ways = (
                r for r in own if r["provider"].startswith(f"{OURS}_") and r["pass"] == which and r["ratio_to_base"]
            )
            found += [told(f"{name}: {words}, {r['provider']}", r["ratio_to_base"]) for r in ways]
        both = ratios((r for r in own if r["pass"] == "fwd_bwd"), PEFT, OURS)
        found.append(least(f"{name}: forward + backward, faster than PEFT", geomean(both.values()), FASTER))
    over = ratios(rows, OURS, ADDMM)
    worst = max(over, key=over.get, default=None)
    return [*found, most("worst row over the addmm_ function", over.get(worst), NOISE, str(worst or ""))]

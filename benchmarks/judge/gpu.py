"""Whether a GPU's result keeps the limits that peftkern sets itself there. Arithmetic on rows, as cpu.py.

lora_linear: bf16, 8192 rows, 4096 x 4096 and 4096 x 14336, R = 16, fp32 adapters, dropout 0.1, each shape by itself:
forward at most 1.05 and forward + backward at most 1.08 of the frozen linear, forward + backward at least 1.6 times as fast
as HF PEFT; and no row slower than the addmm_ function, up to noise.

multi_lora_linear: a step of decoding, 64 rows with an adapter each, R = 16, 4096 x 4096, in a CUDA graph: the branch, added
in place, takes at most 1 / 0.7 of the time that copying its bytes takes, and the layer makes at most 2 launches more than
the frozen linear. Everything else is told.
"""

from __future__ import annotations

from .cpu import ADDMM, BASE, OURS, PEFT, Figure, _least, _most, _told, geomean, times

SHAPES = ((8192, 4096, 4096), (8192, 4096, 14336))
FORWARD, BOTH, FASTER = 1.05, 1.08, 1.6
AIMS = {"fwd": 1.02, "fwd_bwd": 1.05}
# Medians of interleaved samples repeat to about this.
NOISE = 1.03
BANDWIDTH, AIM, LAUNCHES = 0.70, 0.85, 2
BRANCH, BANK = "sgmv_add", "peftkern_bank"
DECODE = dict(M=64, K=4096, N=4096, R=16, adapters=64, mix="distinct", base_share=0.0, ranks="same")


def figures(result: dict) -> list[Figure]:
    """Every figure of a GPU's result."""
    rows = [r for r in result["rows"] if r["device"] == "cuda"]
    return _linear(rows) if result["header"]["op"] == "lora_linear" else _many(rows)


def _linear(rows: list[dict]) -> list[Figure]:
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
            found.append(_most(f"{name}: {words} over the frozen linear", _mean(mine, "ratio_to_base"), limit,
                               f"aim {AIMS[which]:g}{_graph(mine)}"))  # fmt: skip
            found += _ways(own, name, words, which)
        found.append(_least(f"{name}: forward + backward, faster than PEFT", _speed_up(own, PEFT), FASTER))
    over = _over_addmm(rows)
    worst = max(over, key=over.get, default=None)
    found.append(_most("worst row over the addmm_ function", over.get(worst), NOISE, str(worst or "")))
    return found


def _mean(rows: list[dict], field: str) -> float | None:
    return geomean(r[field] for r in rows if r[field] is not None)


def _graph(rows: list[dict]) -> str:
    return ", in a CUDA graph" if rows and all(r.get("graph") for r in rows) else ""


def _ways(rows: list[dict], name: str, words: str, which: str) -> list[Figure]:
    # The ways that were forced, so that a wrong choice of the automatic one shows.
    ways = [r for r in rows if r["provider"].startswith(f"{OURS}_") and r["pass"] == which and r["ratio_to_base"]]
    return [_told(f"{name}: {words}, {r['provider']}", r["ratio_to_base"]) for r in ways]


def _speed_up(rows: list[dict], peer: str) -> float | None:
    both = [r for r in rows if r["pass"] == "fwd_bwd"]
    ours, theirs = times(both, OURS), times(both, peer)
    return geomean(theirs[k] / ours[k] for k in ours if k in theirs)


def _over_addmm(rows: list[dict]) -> dict[tuple, float]:
    ours, theirs = times(rows, OURS), times(rows, ADDMM)
    return {k: ours[k] / theirs[k] for k in ours if k in theirs}


def _many(rows: list[dict]) -> list[Figure]:
    found = []
    decode = [r for r in rows if r["dtype"] == "bf16" and all(r[k] == v for k, v in DECODE.items())]
    base = [r for r in decode if r["provider"] == BASE]
    for kind in ("bf16", "fp32"):
        own = [r for r in decode if r["adapter_dtype"] == kind]
        name = f"bf16, 64 rows, 64 {kind} adapters"
        branch = [r for r in own if r["provider"] == BRANCH and r["median_ms"] is not None]
        share, bank = _mean(branch, "bytes_bound_fraction"), [r for r in own if r["provider"] == BANK]
        if kind == "fp32" and share is None:
            continue
        if any(not r["graph"] for r in branch):
            found.append(Figure(f"{name}: branch, share of copy bandwidth", share, f">= {BANDWIDTH:g}", False,
                                "not measured in a CUDA graph"))  # fmt: skip
        else:
            found.append(_least(f"{name}: branch, share of copy bandwidth", share, BANDWIDTH, f"aim {AIM:g}"))
        found.append(_most(f"{name}: launches beyond the frozen linear", _launches(bank, base), LAUNCHES))
        found.append(_told(f"{name}: bank over the frozen linear", _mean(bank, "ratio_to_base")))
    prefill = [r for r in rows if r["phase"] == "training" and r["provider"] in (OURS, BANK) and r["ratio_to_base"]]
    for r in prefill:
        title = f"{r['dtype']}, {r['M']}x{r['K']}x{r['N']}, {r['adapters']} {r['adapter_dtype']} adapters"
        found.append(_told(f"{title}, {r['pass']}: {r['provider']} over the frozen linear", r["ratio_to_base"]))
    return found


def _launches(ours: list[dict], base: list[dict]) -> float | None:
    mine, theirs = ([r["launches"] for r in rows if r.get("launches") is not None] for rows in (ours, base))
    return float(max(mine) - max(theirs)) if mine and theirs else None

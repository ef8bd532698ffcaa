"""The limits that peftkern sets itself for multi_lora_linear. Arithmetic on the rows of a JSON file.

On a CPU: 4096 x 4096, R = 16, all ranks alike, every row with an adapter, rows spread evenly, adapters of each dtype that
was measured. The *best base* is the faster of the frozen linear and peftkern's own base product in that dtype, in the same
run.

On a GPU: a step of decoding, 64 rows with an adapter each, R = 16, 4096 x 4096, in a CUDA graph: the branch, added in
place, takes at most 1 / 0.7 of the time that copying its bytes takes, and the layer makes at most 2 launches more than the
frozen linear. Everything else is told.
"""

from __future__ import annotations

from collections.abc import Iterable

from .figures import BASE, OURS, Figure, least, mean, most, on_gpu, told

SHAPE = (4096, 4096, 16)  # K, N, R
FORWARD_LIMIT, TRAINING_LIMIT = 1.20, 1.30
BANDWIDTH_SHARE, GATHER_SPEED_UP = 0.5, 10.0
LIST, BANK, BRANCH, ADDED, GATHER = OURS, "peftkern_bank", "sgmv", "sgmv_add", "gather_branch"
# On a GPU.
BANDWIDTH, AIM, LAUNCHES = 0.70, 0.85, 2
DECODE = dict(M=64, K=4096, N=4096, R=16, adapters=64, mix="distinct", base_share=0.0, ranks="same")


def figures(result: dict) -> list[Figure]:
    """Every figure that the rows allow: on a CPU dtype by dtype."""
    if on_gpu(result):
        return _gpu([r for r in result["rows"] if r["device"] == "cuda"])
    found = []
    for dtype in dict.fromkeys(r["dtype"] for r in result["rows"]):
        rows = [r for r in result["rows"] if r["dtype"] == dtype and (r["K"], r["N"], r["R"]) == SHAPE]
        plain = [r for r in rows if r["ranks"] == "same" and r["dropout"] in (None, 0.0)]
        even = [r for r in plain if r["base_share"] == 0 and r["mix"] in ("uniform", "distinct")]
        kinds = sorted({r["adapter_dtype"] for r in even} - {None}, reverse=True) or [dtype]
        for kind in kinds:
            own = [r for r in even if r["adapter_dtype"] == kind]
            name = dtype if kind == dtype else f"{dtype}, {kind} adapters"
            found += [*_forward(own, name), *_training(own, name)]
            if kind == dtype or _pick(own, BRANCH, 32, 32, "fwd"):
                found += _decode(own, name, dtype)
        found += _all_base(plain, dtype)
    return found


def _pick(rows: Iterable[dict], provider: str, M: int, adapters: int, which: str) -> list[dict]:
    want = (provider, M, adapters, which)
    return [
        r for r in rows
        if (r["provider"], r["M"], r["adapters"], r["pass"]) == want and r["median_ms"] is not None
    ]  # fmt: skip


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f} of the frozen linear"


def _forward(rows: list[dict], name: str) -> list[Figure]:
    found = []
    for provider, what in ((LIST, "list"), (BANK, "bank")):
        mine = _pick(rows, provider, 512, 8, "fwd")
        title = f"{name}: 512 rows, 8 adapters, {what}: over the best base"
        found.append(most(title, mean(mine, "ratio_to_best_base"), FORWARD_LIMIT, _times(mean(mine, "ratio_to_base"))))
    return found


def _decode(rows: list[dict], name: str, dtype: str) -> list[Figure]:
    mine, gather = (_pick(rows, provider, 32, 32, "fwd") for provider in (BRANCH, GATHER))
    ms, theirs = mean(mine, "median_ms"), mean(gather, "median_ms")
    speed_up = None if ms is None or theirs is None else theirs / ms
    note = "" if ms is None else f"{ms:.3f} ms"
    title = f"{name}: branch over gather + einsum, speed-up at 32 rows, 32 adapters"
    return [
        least(
            f"{name}: branch at 32 rows, 32 adapters: share of copy bandwidth",
            mean(mine, "bytes_bound_fraction"), BANDWIDTH_SHARE, note,
        ),
        least(title, speed_up, GATHER_SPEED_UP) if dtype == "bf16" else told(title, speed_up),
    ]  # fmt: skip


def _training(rows: list[dict], name: str) -> list[Figure]:
    mine = _pick(rows, LIST, 2048, 8, "fwd_bwd")
    frozen, best = mean(mine, "ratio_to_base"), mean(mine, "ratio_to_best_base")
    title = f"{name}: 2048 rows, 8 adapters, forward + backward"
    # Where the frozen linear is hopeless in this dtype, there is only our own product to compare with.
    over = "the frozen linear" if frozen is not None or not mine else "the best base (no frozen linear)"
    return [
        most(f"{title}: over {over}", best if frozen is None else frozen, TRAINING_LIMIT),
        told(f"{title}: over the best base", best),
    ]


def _all_base(rows: list[dict], dtype: str) -> list[Figure]:
    found = []
    for M, which in ((32, "fwd"), (512, "fwd"), (512, "fwd_bwd")):
        mine = [
            r for r in rows
            if (r["provider"], r["M"], r["pass"], r["base_share"]) == (LIST, M, which, 1.0) and r["median_ms"]
        ]  # fmt: skip
        if mine:
            title = f"{dtype}: {M} rows, none with an adapter, {which}: over the best base"
            found.append(told(title, mean(mine, "ratio_to_best_base")))
    return found


def _gpu(rows: list[dict]) -> list[Figure]:
    found = []
    decode = [r for r in rows if r["dtype"] == "bf16" and all(r[k] == v for k, v in DECODE.items())]
    base = [r for r in decode if r["provider"] == BASE]
    for kind in ("bf16", "fp32"):
        own = [r for r in decode if r["adapter_dtype"] == kind]
        name = f"bf16, 64 rows, 64 {kind} adapters"
        branch = [r for r in own if r["provider"] == ADDED and r["median_ms"] is not None]
        share, bank = mean(branch, "bytes_bound_fraction"), [r for r in own if r["provider"] == BANK]
        if kind == "fp32" and share is None:
            continue
        if any(not r["graph"] for r in branch):
            found.append(Figure(f"{name}: branch, share of copy bandwidth", share, f">= {BANDWIDTH:g}", False,
                                "not measured in a CUDA graph"))  # fmt: skip
        else:
            found.append(least(f"{name}: branch, share of copy bandwidth", share, BANDWIDTH, f"aim {AIM:g}"))
        found.append(most(f"{name}: launches beyond the frozen linear", _launches(bank, base), LAUNCHES))
        found.append(told(f"{name}: bank over the frozen linear", mean(bank, "ratio_to_base")))
    prefill = [r for r in rows if r["phase"] == "training" and r["provider"] in (OURS, BANK) and r["ratio_to_base"]]
    for r in prefill:
        title = f"{r['dtype']}, {r['M']}x{r['K']}x{r['N']}, {r['adapters']} {r['adapter_dtype']} adapters"
        found.append(told(f"{title}, {r['pass']}: {r['provider']} over the frozen linear", r["ratio_to_base"]))
    return found


def _launches(ours: list[dict], base: list[dict]) -> float | None:
    mine, theirs = ([r["launches"] for r in rows if r.get("launches") is not None] for rows in (ours, base))
    return float(max(mine) - max(theirs)) if mine and theirs else None

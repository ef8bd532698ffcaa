"""Whether a multi_lora_linear result keeps the limits that peftkern sets itself on CPU. Arithmetic on rows, as cpu.py.

Judged at 4096 x 4096, R = 16, all ranks alike, every row with an adapter, rows spread evenly, adapters of each dtype
that was measured. The *best base* is the faster of the frozen linear and peftkern's own base product in that dtype, in
the same run.
"""

from __future__ import annotations

from collections.abc import Iterable

from .cpu import OURS, Figure, _least, _most, _told, geomean

SHAPE = (4096, 4096, 16)  # K, N, R
FORWARD_LIMIT, TRAINING_LIMIT = 1.20, 1.30
BANDWIDTH_SHARE, GATHER_SPEED_UP = 0.5, 10.0
LIST, BANK, BRANCH, GATHER = OURS, "peftkern_bank", "sgmv", "gather_branch"


def figures(result: dict) -> list[Figure]:
    """Every figure that the rows allow, dtype by dtype."""
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


def _mean(rows: list[dict], field: str) -> float | None:
    return geomean(r[field] for r in rows if r[field] is not None)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f} of the frozen linear"


def _forward(rows: list[dict], name: str) -> list[Figure]:
    found = []
    for provider, what in ((LIST, "list"), (BANK, "bank")):
        mine = _pick(rows, provider, 512, 8, "fwd")
        title = f"{name}: 512 rows, 8 adapters, {what}: over the best base"
        found.append(
            _most(title, _mean(mine, "ratio_to_best_base"), FORWARD_LIMIT, _times(_mean(mine, "ratio_to_base")))
        )
    return found


def _decode(rows: list[dict], name: str, dtype: str) -> list[Figure]:
    mine, gather = (_pick(rows, provider, 32, 32, "fwd") for provider in (BRANCH, GATHER))
    ms, theirs = _mean(mine, "median_ms"), _mean(gather, "median_ms")
    speed_up = None if ms is None or theirs is None else theirs / ms
    note = "" if ms is None else f"{ms:.3f} ms"
    title = f"{name}: branch over gather + einsum, speed-up at 32 rows, 32 adapters"
    return [
        _least(
            f"{name}: branch at 32 rows, 32 adapters: share of copy bandwidth",
            _mean(mine, "bytes_bound_fraction"), BANDWIDTH_SHARE, note,
        ),
        _least(title, speed_up, GATHER_SPEED_UP) if dtype == "bf16" else _told(title, speed_up),
    ]  # fmt: skip


def _training(rows: list[dict], name: str) -> list[Figure]:
    mine = _pick(rows, LIST, 2048, 8, "fwd_bwd")
    frozen, best = _mean(mine, "ratio_to_base"), _mean(mine, "ratio_to_best_base")
    title = f"{name}: 2048 rows, 8 adapters, forward + backward"
    # Where the frozen linear is hopeless in this dtype, there is only our own product to compare with.
    over = "the frozen linear" if frozen is not None or not mine else "the best base (no frozen linear)"
    return [
        _most(f"{title}: over {over}", best if frozen is None else frozen, TRAINING_LIMIT),
        _told(f"{title}: over the best base", best),
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
            found.append(_told(title, _mean(mine, "ratio_to_best_base")))
    return found

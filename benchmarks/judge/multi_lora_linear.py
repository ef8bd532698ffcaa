"""The limits that peftkern sets itself for multi_lora_linear. Arithmetic on the rows of a JSON file.

On a CPU: 4096 x 4096, R = 16, all ranks alike, every row with an adapter, rows spread evenly, adapters of each dtype that
was measured; decoding at 3072 x 3072 too. The *best base* is the faster of the frozen linear and peftkern's own base product
in that dtype, in the same run. A CPU with AVX2 and nothing wider has some limits of its own, one of them for that product in
fp32, whatever the layer, from 512 rows on.

On a GPU: a step of decoding, 64 rows with an adapter each, R = 16, 4096 x 4096, in a CUDA graph: the branch, added in
place, takes at most 1 / 0.7 of the time that copying its bytes takes, and the layer makes at most 2 launches more than the
frozen linear. Everything else is told.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from ..core.case import OWN_BASE
from .figures import BASE, OURS, Figure, at_most_avx2, geomean, least, mean, most, on_gpu, told
from .lora_linear import AIM as PEAK_AIM

RANK = 16
SIZE, DECODE_SIZES = (4096, 4096), ((4096, 4096), (3072, 3072))  # K, N
FORWARD_LIMIT, TRAINING_LIMIT = 1.10, 1.30
BANDWIDTH_SHARE = 0.6
GATHER_SPEED_UP, GATHER_SPEED_UP_AVX2 = 10.0, 6.0
# Of our fp32 product with AVX2: its speed-up over the vendor's, and its share of the peak.
PRODUCT_SPEED_UP, PEAK_SHARE = 1.10, 0.70
PREFILL, DECODING, TRAINING = range(480, 513), (32,), (2048,)  # rows
LIST, BANK, BRANCH, ADDED, GATHER = OURS, "peftkern_bank", "sgmv", "sgmv_add", "gather_branch"
LISTED = "sgmv_list"
# On a GPU.
BANDWIDTH, AIM, LAUNCHES = 0.70, 0.85, 2
DECODE = dict(M=64, K=4096, N=4096, R=16, adapters=64, mix="distinct", base_share=0.0, ranks="same")


def figures(result: dict) -> list[Figure]:
    """Every figure that the rows allow: on a CPU dtype by dtype."""
    if on_gpu(result):
        return _gpu([r for r in result["rows"] if r["device"] == "cuda"])
    found, avx2 = [], at_most_avx2(result)
    for dtype in dict.fromkeys(r["dtype"] for r in result["rows"]):
        rows = [r for r in result["rows"] if r["dtype"] == dtype]
        plain = [r for r in rows if r["R"] == RANK and r["ranks"] == "same" and r["dropout"] in (None, 0.0)]
        even = [r for r in plain if r["base_share"] == 0 and r["mix"] in ("uniform", "distinct")]
        kinds = sorted({r["adapter_dtype"] for r in even} - {None}, reverse=True) or [dtype]
        for kind in kinds:
            own = [r for r in even if r["adapter_dtype"] == kind]
            name = dtype if kind == dtype else f"{dtype}, {kind} adapters"
            found += [*_forward(_sized(own, SIZE), name), *_training(_sized(own, SIZE), name)]
            for size in DECODE_SIZES:
                here = _sized(own, size)
                if (kind == dtype and size == SIZE) or _pick(here, BRANCH, DECODING, 32, "fwd"):
                    found += _decode(here, name if size == SIZE else f"{name}, {size[0]}x{size[1]}", dtype, avx2)
        found += [*_all_base(_sized(plain, SIZE), dtype), *_product(rows, dtype, avx2 and dtype == "fp32")]
    return found


def _sized(rows: Iterable[dict], size: tuple[int, int]) -> list[dict]:
    return [r for r in rows if (r["K"], r["N"]) == size]


def _pick(rows: Iterable[dict], provider: str, M: Container[int], adapters: int, which: str) -> list[dict]:
    want = (provider, adapters, which)
    return [
        r for r in rows
        if (r["provider"], r["adapters"], r["pass"]) == want and r["M"] in M and r["median_ms"] is not None
    ]  # fmt: skip


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f} of the frozen linear"


def _forward(rows: list[dict], name: str) -> list[Figure]:
    found = []
    for provider, what in ((LIST, "list"), (BANK, "bank")):
        mine = _pick(rows, provider, PREFILL, 8, "fwd")
        title = f"{name}: 480 to 512 rows, 8 adapters, {what}: over the best base"
        found.append(most(title, mean(mine, "ratio_to_best_base"), FORWARD_LIMIT, _times(mean(mine, "ratio_to_base"))))
    return found


def _decode(rows: list[dict], name: str, dtype: str, avx2: bool) -> list[Figure]:
    mine, gather = (_pick(rows, provider, DECODING, 32, "fwd") for provider in (BRANCH, GATHER))
    ms, theirs = mean(mine, "median_ms"), mean(gather, "median_ms")
    speed_up = None if ms is None or theirs is None else theirs / ms
    note = "" if ms is None else f"{ms:.3f} ms"
    title = f"{name}: branch over gather + einsum, speed-up at 32 rows, 32 adapters"
    faster = GATHER_SPEED_UP_AVX2 if avx2 else GATHER_SPEED_UP
    listed, shares = _pick(rows, LISTED, DECODING, 32, "fwd"), []
    if listed:
        shares.append(least(
            f"{name}: branch of a list at 32 rows, 32 adapters: share of copy bandwidth",
            mean(listed, "bytes_bound_fraction"), BANDWIDTH_SHARE, f"{mean(listed, 'median_ms'):.3f} ms",
        ))  # fmt: skip
    return [
        least(
            f"{name}: branch at 32 rows, 32 adapters: share of copy bandwidth",
            mean(mine, "bytes_bound_fraction"), BANDWIDTH_SHARE, note,
        ),
        *shares,
        least(title, speed_up, faster) if dtype == "bf16" else told(title, speed_up),
    ]  # fmt: skip


def _training(rows: list[dict], name: str) -> list[Figure]:
    mine = _pick(rows, LIST, TRAINING, 8, "fwd_bwd")
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


def _product(rows: list[dict], dtype: str, held: bool) -> list[Figure]:
    """peftkern's own base product beside the vendor's, ``held`` to limits or told."""
    found = []
    for which in ("fwd", "fwd_bwd"):
        mine = [
            r for r in rows
            if (r["provider"], r["pass"]) == (OWN_BASE, which) and r["M"] >= 512 and r["median_ms"] is not None
        ]  # fmt: skip
        faster = [1 / r["ratio_to_base"] for r in mine if r["ratio_to_base"]]
        share, title = mean(mine, "flops_bound_fraction"), f"{dtype}: own base product from 512 rows on, {which}"
        for name, value, limit, note in (
            (f"{title}: over the vendor's, speed-up", geomean(faster), PRODUCT_SPEED_UP, f"{len(faster)} rows"),
            (f"{title}: over the vendor's, least speed-up", min(faster, default=None), 1.0, ""),
            (f"{title}: share of the peak", share, PEAK_SHARE, f"aim {PEAK_AIM:g}"),
        ):  # fmt: skip
            if value is not None:
                found.append(least(name, value, limit, note) if held else told(name, value, note))
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

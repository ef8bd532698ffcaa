"""The generated parts of docs/performance.md: what committed results say of floors and gaps, and calculations.

Every line of a ``calculated`` part follows from sizes and data-sheet rates (model.py) and says so; everything in a
``benchmarks`` part is read from a JSON file that a run has written.
"""

from __future__ import annotations

from ..core.case import BASE, FP32_BASE
from ..core.floor import lora_floor
from ..judge import gpu as gpu_judge
from ..judge.cpu import OURS, RANKS, geomean, slow_half
from . import model

CALCULATION = "*A calculation from sizes and data-sheet rates, not a measurement.*"
LIMITS = "*Limits, and calculations from sizes and data-sheet rates; not measurements.*"
NOTHING = "No result of a GPU is committed yet.\n"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def rates() -> str:
    """The assumed rates."""
    rows = [[c.name, f"{c.bandwidth / 1e12:.2f} TB/s", f"{model.PEAK / 1e12:.0f} TFLOP/s",
             f"{model.PRODUCT / 1e12:.0f} TFLOP/s"] for c in model.CHIPS]  # fmt: skip
    head = ["GPU", "memory, data sheet", "dense bf16, data sheet", "a vendor's product, assumed"]
    return "\n".join([CALCULATION, "", *_table(head, rows)])


def _columns() -> list[tuple[tuple[int, int, int], model.Chip]]:
    return [(shape, chip) for shape in model.SHAPES for chip in model.CHIPS]


def _part_rows(make) -> list[list[str]]:
    rows = []
    for i, part in enumerate(make(*model.SHAPES[0])):
        cells = []
        for shape, chip in _columns():
            own = make(*shape)[i]
            cells.append(f"({_us(own.alone(chip))})" if own.beside else _us(own.seconds(chip)))
        where = f", {'in' if part.beside == 'L2' else 'beside'} {part.beside}" if part.beside else ""
        rows.append([part.name + where, part.formula, *cells])
    return rows


def _both(*shape) -> list[model.Part]:
    return [*model.forward(*shape), *model.backward(*shape)]


def _paid(*shape) -> list[model.Part]:
    # Nothing beside anything, nothing in a cache.
    return [model.Part(part.name, part.formula, part.flops, part.bytes) for part in _both(*shape)]


def _over_base(parts, products: int) -> list[float]:
    """Sums over ``products`` base products, for each column."""
    return [model.total(parts(*s), c) / (products * model.forward(*s)[0].seconds(c)) for s, c in _columns()]


def _over_peft() -> list[float]:
    found = []
    for shape, chip in _columns():
        theirs = 2 * model.forward(*shape)[0].seconds(chip) + model.eager_bytes(*shape) / chip.bandwidth
        found.append(theirs / model.total(_both(*shape), chip))
    return found


def _named(values: list[float], form: str) -> list[str]:
    return [form.format(value) for value in values]


def linear() -> str:
    """lora_linear, M = 8192: parts in microseconds, sums, and ratios to the two base products."""
    where = [f"{K}x{N}, {chip.name}" for (_, K, N), chip in _columns()]
    head = ["M = 8192, R = 16, fp32 adapters, microseconds", "cost", *where]
    lines = [CALCULATION, "", *_table(head, _part_rows(model.forward) + _part_rows(model.backward))]
    rows = [
        ["forward", *_named(_over_base(model.forward, 1), "{:.3f}")],
        ["forward + backward", *_named(_over_base(_both, 2), "{:.3f}")],
        ["forward + backward, were all that stands in brackets paid for", *_named(_over_base(_paid, 2), "{:.3f}")],
        ["HF PEFT over this, its operations by their bytes: 56 M N + 48 M K", *_named(_over_peft(), "{:.2f}")],
    ]
    return "\n".join([*lines, *_table(["over the frozen linear", *where], rows)])


def floors() -> str:
    """Both floors of lora_linear in milliseconds."""
    rows = []
    for which, words in (("fwd", "forward"), ("fwd_bwd", "forward + backward")):
        for shape in model.SHAPES:
            f = lora_floor(model.case(*shape), which)
            flops, moved = f.base_flops + f.branch_flops, f.base_bytes + f.branch_bytes
            rows.append([
                words, "x".join(map(str, shape)), f"{flops / 1e12:.3f}", f"{f.branch_flops / f.base_flops:.2%}",
                f"{moved / 1e6:.0f}", f"{f.branch_bytes / f.base_bytes:.1%}", f"{flops / model.PRODUCT * 1e3:.3f}",
                *(f"{moved / c.bandwidth * 1e3:.3f}" for c in model.CHIPS),
            ])  # fmt: skip
    head = ["pass", "M x K x N", "TFLOP", "branch of base", "MB", "branch of base", "FLOPs, ms",
            *(f"bytes, ms, {c.name}" for c in model.CHIPS)]  # fmt: skip
    return "\n".join([CALCULATION, "", *_table(head, rows)])


def many() -> str:
    """Decoding with many adapters, and what limits mean in microseconds."""
    rows = []
    for M, K, N, adapters in ((64, 4096, 4096, 64), (64, 4096, 14336, 64), (64, 4096, 4096, 8), (64, 4096, 4096, 1)):
        for adapter, kind in ((2, "bf16"), (4, "fp32")) if (adapters, N) == (64, 4096) else ((2, "bf16"),):
            base, *branch = model.decode(M, K, N, adapters, adapter=adapter)
            moved = sum(p.bytes for p in branch)
            rows.append([
                f"{M}x{K}x{N}", f"{adapters} {kind}", f"{base.bytes / 1e6:.1f}", f"{moved / 1e6:.2f}",
                *(_us(base.seconds(c)) for c in model.CHIPS), *(_us(moved / c.bandwidth) for c in model.CHIPS),
                *(_us(moved / c.bandwidth / gpu_judge.BANDWIDTH) for c in model.CHIPS),
            ])  # fmt: skip
    names = [c.name for c in model.CHIPS]
    head = ["M x K x N", "adapters, R = 16", "base, MB", "branch, MB", *(f"base, us, {n}" for n in names),
            *(f"branch, us, {n}" for n in names), *(f"its limit, us, {n}" for n in names)]  # fmt: skip
    return "\n".join([CALCULATION, "", *_table(head, rows)])


def norm() -> str:
    """The row norm."""
    rows = [[f"{N}x{K}", f"{model.row_norm(N, K)[0].bytes / 1e6:.1f}",
             *(_us(model.total(model.row_norm(N, K), c)) for c in model.CHIPS)]
            for N, K in ((4096, 4096), (14336, 4096))]  # fmt: skip
    head = ["N x K", "MB", *(f"us, {c.name}" for c in model.CHIPS)]
    return "\n".join([CALCULATION, "", *_table(head, rows)])


def limits() -> str:
    """What ``report --judge`` holds a GPU's result to, what is expected, and what our product may lose to the vendor's."""
    g = gpu_judge
    forward, both = _over_base(model.forward, 1), _over_base(_both, 2)
    times = [_us(sum(p.bytes for p in model.decode(64, 4096, 4096, 64)[1:]) / c.bandwidth) for c in model.CHIPS]
    copied = f"{', '.join(f'{t} us on {c.name}' for t, c in zip(times, model.CHIPS))} at the full rate"
    rows = [
        ["lora_linear, forward", "frozen linear", f"<= {g.FORWARD:g}", f"{g.AIMS['fwd']:g}",
         *_named(forward, "{:.3f}")],
        ["where our product may take, of the vendor's time", "", "", "",
         *_named([1 + g.FORWARD - value for value in forward], "{:.3f}")],
        ["lora_linear, forward + backward", "frozen linear", f"<= {g.BOTH:g}", f"{g.AIMS['fwd_bwd']:g}",
         *_named(both, "{:.3f}")],
        ["where our product may take, of the vendor's time", "", "", "",
         *_named([1 + g.BOTH - value for value in both], "{:.3f}")],
        ["lora_linear, forward + backward, speed-up", "HF PEFT, by bytes", f">= {g.FASTER:g}", "",
         *_named(_over_peft(), "{:.2f}")],
        ["lora_linear, every row", "`addmm_` function", f"<= {g.NOISE:g}", "", *[""] * 4],
        ["decoding, branch", "copying its bytes", f">= {g.BANDWIDTH:.0%}", f"{g.AIM:.0%}", copied, "", "", ""],
        ["decoding, launches", "beyond the frozen linear's", f"<= {g.LAUNCHES}", "", *[""] * 4],
    ]  # fmt: skip
    where = [f"expected, {K}x{N}, {chip.name}" for (_, K, N), chip in _columns()]
    return "\n".join([LIMITS, "", *_table(["figure", "over", "limit", "aim", *where], rows)])


CALCULATED = {
    "rates": rates, "lora_linear": linear, "floors": floors, "multi_lora_linear": many, "row_norm": norm,
    "limits": limits,
}  # fmt: skip


def gap(result: dict) -> list[str]:
    """Floor, measured ratio and the factor between, where a lora_linear result has both; forward + backward."""
    lines = []
    for dtype in dict.fromkeys(r["dtype"] for r in result["rows"]):
        rows = [r for r in result["rows"] if r["dtype"] == dtype and r["pass"] == "fwd_bwd"]
        slow = slow_half(rows, dtype)
        field, base = ("ratio_to_fp32_base", FP32_BASE) if slow else ("ratio_to_base", BASE)
        over = "frozen fp32 linear" if slow else "frozen linear"
        table = []
        ranks = " and ".join(str(R) for R in RANKS if any(r["R"] == R for r in rows))
        for shape in dict.fromkeys((r["M"], r["K"], r["N"]) for r in rows):
            own = [r for r in rows if (r["M"], r["K"], r["N"]) == shape]
            ours = [r for r in own if r["provider"] == OURS and r["adapter_dtype"] == "fp32" and r["R"] in RANKS]
            ours = [r for r in ours if r[field] is not None]
            if ours:
                ms = [r["median_ms"] for r in own if r["provider"] == base and r["median_ms"]]
                floor, ratio = (geomean(r[name] for r in ours) for name in ("floor_ratio", field))
                share = geomean(r["bytes_bound_fraction"] for r in ours)
                table.append(["x".join(map(str, shape)), f"{geomean(ms):.2f}", f"{floor:.3f}", f"{ratio:.2f}",
                              f"{ratio / floor:.2f}", f"{share:.0%}"])  # fmt: skip
        head = ["M x K x N", f"{over}, ms", "floor", "peftkern", "gap", "of copy bandwidth"]
        lines += [f"{dtype}, fp32 adapters, R = {ranks}, dropout 0 and 0.1: over a {over}", "", *_table(head, table)]
    return lines


def gap_many(result: dict) -> list[str]:
    """The branch alone while decoding, and layers in prefill and training, of a multi_lora_linear result."""
    rows = [r for r in result["rows"] if r["adapter_dtype"] in (r["dtype"], None) and r["dropout"] in (None, 0.0)]
    branch, layer = [], []
    for r in rows:
        population = f"{r['adapters']} {r['mix']}" + (f", {r['base_share']:.0%} base" if r["base_share"] else "")
        rank = f"{'up to ' if r['ranks'] == 'mixed' else ''}{r['R']}"
        label = [r["dtype"], f"{r['M']}x{r['K']}x{r['N']}", rank, population]
        if r["provider"] in ("sgmv", "sgmv_add") and r["median_ms"] is not None:
            branch.append([*label, f"{r['median_ms'] * 1e3:.0f}", f"{r['copy_gb_per_s']:.1f}",
                           f"{r['bytes_bound_fraction']:.0%}"])  # fmt: skip
        elif r["provider"] == OURS and r["phase"] == "training" and r["ratio_to_base"] and r["floor_ratio"]:
            layer.append([*label, r["pass"], f"{r['floor_ratio']:.3f}", f"{r['ratio_to_base']:.2f}",
                          f"{r['ratio_to_base'] / r['floor_ratio']:.2f}"])  # fmt: skip
    head = ["dtype", "M x K x N", "R", "adapters"]
    lines = ["The branch alone, decoding, adapters in the same dtype", ""]
    lines += _table([*head, "us", "copy, GB/s", "of copy bandwidth"], branch)
    lines += ["The layer, adapters in the same dtype: over a frozen linear", ""]
    return lines + _table([*head, "pass", "floor", "peftkern", "gap"], layer)


def ways(result: dict) -> list[str]:
    """Every provider of a GPU's lora_linear result at the judged sizes, forward and forward + backward."""
    rows = [r for r in result["rows"] if (r["M"], r["K"], r["N"]) in model.SHAPES and r["dropout"] in (None, 0.1)
            and r["adapter_dtype"] in (None, "fp32") and r["R"] == model.RANK]  # fmt: skip
    table = []
    for name in dict.fromkeys(r["provider"] for r in rows):
        cells = []
        for shape in model.SHAPES:
            for which in ("fwd", "fwd_bwd"):
                mine = [r for r in rows if r["provider"] == name and (r["M"], r["K"], r["N"]) == shape
                        and r["pass"] == which]  # fmt: skip
                value = mine[0]["median_ms" if name == BASE else "ratio_to_base"] if mine else None
                cells.append("" if value is None else f"{value:.3f}" + (" ms" if name == BASE else ""))
        table.append([name, *cells])
    head = ["", *(f"{'x'.join(map(str, s))}, {w}" for s in model.SHAPES for w in ("forward", "forward + backward"))]
    return ["fp32 adapters, R = 16, dropout 0.1: over the frozen linear", "", *_table(head, table)]

"""What results say beside the tables of README: floors and the gap to them, and every way of a GPU."""

from __future__ import annotations

from ..core.case import BASE, FP32_BASE
from ..judge.figures import OURS, geomean
from ..judge.lora_linear import RANKS, slow_half
from . import model
from .markdown import table


def gap(result: dict) -> list[str]:
    """Floor, measured ratio and the factor between, where a lora_linear result has both; forward + backward."""
    lines = []
    for dtype in dict.fromkeys(r["dtype"] for r in result["rows"]):
        rows = [r for r in result["rows"] if r["dtype"] == dtype and r["pass"] == "fwd_bwd"]
        slow = slow_half(rows, dtype)
        field, base = ("ratio_to_fp32_base", FP32_BASE) if slow else ("ratio_to_base", BASE)
        over = "frozen fp32 linear" if slow else "frozen linear"
        found = []
        ranks = " and ".join(str(R) for R in RANKS if any(r["R"] == R for r in rows))
        for shape in dict.fromkeys((r["M"], r["K"], r["N"]) for r in rows):
            own = [r for r in rows if (r["M"], r["K"], r["N"]) == shape]
            ours = [r for r in own if r["provider"] == OURS and r["adapter_dtype"] == "fp32" and r["R"] in RANKS]
            ours = [r for r in ours if r[field] is not None]
            if ours:
                ms = [r["median_ms"] for r in own if r["provider"] == base and r["median_ms"]]
                floor, ratio = (geomean(r[name] for r in ours) for name in ("floor_ratio", field))
                share = geomean(r["bytes_bound_fraction"] for r in ours)
                found.append(["x".join(map(str, shape)), f"{geomean(ms):.2f}", f"{floor:.3f}", f"{ratio:.2f}",
                              f"{ratio / floor:.2f}", f"{share:.0%}"])  # fmt: skip
        head = ["M x K x N", f"{over}, ms", "floor", "peftkern", "gap", "of copy bandwidth"]
        lines += [f"{dtype}, fp32 adapters, R = {ranks}, dropout 0 and 0.1: over a {over}", "", *table(head, found)]
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
    lines += table([*head, "us", "copy, GB/s", "of copy bandwidth"], branch)
    lines += ["The layer, adapters in the same dtype: over a frozen linear", ""]
    return lines + table([*head, "pass", "floor", "peftkern", "gap"], layer)


def ways(result: dict) -> list[str]:
    """Every provider of a GPU's lora_linear result at the judged sizes, forward and forward + backward."""
    rows = [r for r in result["rows"] if (r["M"], r["K"], r["N"]) in model.SHAPES and r["dropout"] in (None, 0.1)
            and r["adapter_dtype"] in (None, "fp32") and r["R"] == model.RANK]  # fmt: skip
    found = []
    for name in dict.fromkeys(r["provider"] for r in rows):
        cells = []
        for shape in model.SHAPES:
            for which in ("fwd", "fwd_bwd"):
                mine = [r for r in rows if r["provider"] == name and (r["M"], r["K"], r["N"]) == shape
                        and r["pass"] == which]  # fmt: skip
                value = mine[0]["median_ms" if name == BASE else "ratio_to_base"] if mine else None
                cells.append("" if value is None else f"{value:.3f}" + (" ms" if name == BASE else ""))
        found.append([name, *cells])
    head = ["", *(f"{'x'.join(map(str, s))}, {w}" for s in model.SHAPES for w in ("forward", "forward + backward"))]
    return ["fp32 adapters, R = 16, dropout 0.1: over the frozen linear", "", *table(head, found)]

"""What a GPU's result says beside the tables of README: every way of computing an op."""

from __future__ import annotations

from ..core.case import BASE
from . import model
from .markdown import table


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

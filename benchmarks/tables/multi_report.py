"""Markdown tables of a multi_lora_linear result, for README (report.py says where they go)."""

from __future__ import annotations

from ..core.case import BASE, FP32_BASE, OWN_BASE

COLUMNS = (
    ("loop", "loop"),
    ("gather + einsum", "gather"),
    ("`grouped_mm`", "grouped_mm"),
    ("PEFT", "peft"),
    ("PolyLoRA", "polylora"),
    ("**list**", "peftkern"),
    ("**bank**", "peftkern_bank"),
)
POPULATION = ("M", "K", "N", "R", "adapters", "mix", "base_share", "ranks")
WORDS = {"fwd": "forward", "fwd_bwd": "forward + backward"}


def markdown(rows: list[dict], dtype: str) -> list[str]:
    """Lines for one dtype: decoding, then forward and forward + backward of many rows."""
    rows = [r for r in rows if r["dropout"] in (None, 0.0)]
    same = [r for r in rows if r["adapter_dtype"] in (None, dtype)]
    parts = [(f"{dtype}, decoding", [r for r in same if r["phase"] == "decode"])]
    for which, words in WORDS.items():
        training = [r for r in same if (r["phase"], r["pass"]) == ("training", which)]
        parts.append((f"{dtype}, {words}", training))
    return [line for title, own in parts if own for line in _table(title, own)]


def _table(title: str, rows: list[dict]) -> list[str]:
    cases: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        cases.setdefault(tuple(r[name] for name in POPULATION), {})[r["provider"]] = r
    slow = not any(by[BASE]["median_ms"] for by in cases.values() if BASE in by)
    field = "ratio_to_fp32_base" if slow else "ratio_to_base"
    columns = [c for c in COLUMNS if any(c[1] in by for by in cases.values())]
    branch = any("sgmv" in by for by in cases.values())
    head = ["M x K x N", "R", "adapters", "rows on the base", "frozen linear, ms", "own base", *(c[0] for c in columns)]
    head += ["branch alone, ms", "of copy bandwidth"] if branch else []
    lines = [
        f"{title}, adapters in the same dtype: time over a frozen {'fp32 ' if slow else ''}linear",
        "",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
    ]
    for (M, K, N, R, adapters, mix, base_share, ranks), by in cases.items():
        base = by.get(FP32_BASE if slow else BASE, {}).get("median_ms")
        cells = [f"{M}x{K}x{N}", f"{'up to ' if ranks == 'mixed' else ''}{R}", f"{adapters} {mix}", f"{base_share:.0%}",
                 f"{base:.2f}" if base else "slow", _cell(by.get(OWN_BASE), field)]  # fmt: skip
        cells += [_cell(by.get(name), field) for _, name in columns]
        if branch:
            ours = by.get("sgmv", {})
            ms, share = ours.get("median_ms"), ours.get("bytes_bound_fraction")
            cells += [f"{ms:.3f}" if ms else "", f"{share:.0%}" if share else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(row: dict | None, field: str) -> str:
    if row is None:
        return ""
    return f"{row[field]:.2f}" if row[field] is not None else "too slow to time"

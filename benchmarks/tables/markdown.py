"""Markdown tables of a result, for README (report.py says where they go)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..core.case import BASE, FP32_BASE, OWN_BASE
from ..judge.figures import OURS, mean
from ..judge.lora_linear import RANKS, slow_half
from .shares import FLOOR, SHARES, cells, heads

# Heading and provider of the columns, with one adapter and with many.
ONE = (
    ("PEFT", "peft"),
    ("PEFT compiled", "peft_compile"),
    ("`addmm_` function", "addmm"),
    ("**peftkern**", "peftkern"),
)
MANY = (
    ("own base", OWN_BASE),
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
ALONE = ["branch alone, ms", "of copy bandwidth"]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table, and an empty one."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


@dataclass
class Line:
    """One line: its first cells, the rows of each provider, whose means it shows, and its last cells."""

    labels: list[str]
    by: dict[str, list[dict]]
    more: list[str] = field(default_factory=list)

    def mean(self, provider: str, name: str, form: str, absent: str = "") -> str:
        """Of a field over a provider's rows."""
        value = mean(self.by.get(provider, ()), name)
        return absent if value is None else form.format(value)


def comparison(
    head: list[str], columns: Sequence[tuple[str, str]], more: list[str], lines: list[Line], slow: bool
) -> list[str]:
    """Ratios to the frozen linear of the providers that have a row (``slow``: to the fp32 one), between the titled labels
    and what ``more`` a line shows."""
    name, base = ("ratio_to_fp32_base", FP32_BASE) if slow else ("ratio_to_base", BASE)
    columns = [c for c in columns if any(c[1] in line.by for line in lines)]
    rows = [
        [*line.labels, line.mean(base, "median_ms", "{:.2f}", "slow"),
         *(line.mean(p, name, "{:.2f}", "too slow to time" if p in line.by else "") for _, p in columns), *line.more]
        for line in lines
    ]  # fmt: skip
    return table([*head, "frozen linear, ms", *(title for title, _ in columns), *more], rows)


def markdown(rows: list[dict], dtype: str) -> list[str]:
    """Lines for one dtype."""
    return (_many if any(r.get("adapters") for r in rows) else _one)(rows, dtype)


def _one(rows: list[dict], dtype: str) -> list[str]:
    # Forward + backward with fp32 adapters: a line per shape and dropout, means over ranks.
    slow = slow_half(rows, dtype)
    over = "a frozen fp32 linear (torch's own product is slow in this dtype here)" if slow else "a frozen linear"
    rows = [r for r in rows if r["pass"] == "fwd_bwd" and (r["R"] in RANKS or r["provider"] in (BASE, FP32_BASE))]
    lines, more = [], heads(rows, FLOOR, SHARES)
    for shape in dict.fromkeys((r["M"], r["K"], r["N"]) for r in rows):
        own = [r for r in rows if (r["M"], r["K"], r["N"]) == shape]
        for dropout in sorted({r["dropout"] for r in own if r["dropout"] is not None}):
            here = [r for r in own if r["dropout"] in (None, dropout)]
            by = _by_provider(r for r in here if r["adapter_dtype"] in (None, "fp32"))
            lines.append(Line(["x".join(map(str, shape)), f"{dropout:g}"], by, cells(by.get(OURS, []), more)))
    ranks = " and ".join(str(r) for r in RANKS if any(row["R"] == r for row in rows))
    title = f"{dtype}, forward + backward, R = {ranks}, fp32 adapters: time over {over}"
    return [title, "", *comparison(["M x K x N", "dropout"], ONE, more, lines, slow)]


def _many(rows: list[dict], dtype: str) -> list[str]:
    # Decoding, then forward and forward + backward of many rows, adapters in the same dtype: a line per population.
    same = [r for r in rows if r["dropout"] in (None, 0.0) and r["adapter_dtype"] in (None, dtype)]
    parts = {"decoding": [r for r in same if r["phase"] == "decode"]}
    for which, words in WORDS.items():
        parts[words] = [r for r in same if (r["phase"], r["pass"]) == ("training", which)]
    found = []
    for words, own in parts.items():
        slow = not any(r["median_ms"] for r in own if r["provider"] == BASE)
        branch = any(r["provider"] == "sgmv" for r in own)
        lines, floors = [], heads(own, FLOOR, SHARES)
        for population in dict.fromkeys(tuple(r[name] for name in POPULATION) for r in own):
            M, K, N, R, adapters, mix, share, ranks = population
            line = Line([f"{M}x{K}x{N}", f"{'up to ' if ranks == 'mixed' else ''}{R}", f"{adapters} {mix}", f"{share:.0%}"],
                        _by_provider(r for r in own if tuple(r[name] for name in POPULATION) == population))  # fmt: skip
            alone = [line.mean("sgmv", "median_ms", "{:.3f}"), line.mean("sgmv", "bytes_bound_fraction", "{:.0%}")]
            line.more = [*cells(line.by.get(OURS, []), floors), *(alone if branch else ())]
            lines.append(line)
        if lines:
            title = f"{dtype}, {words}, adapters in the same dtype: time over a frozen {'fp32 ' if slow else ''}linear"
            head = ["M x K x N", "R", "adapters", "rows on the base"]
            found += [title, "", *comparison(head, MANY, [*floors, *(ALONE if branch else ())], lines, slow)]
    return found


def _by_provider(rows: Iterable[dict]) -> dict[str, list[dict]]:
    by: dict[str, list[dict]] = {}
    for r in rows:
        by.setdefault(r["provider"], []).append(r)
    return by

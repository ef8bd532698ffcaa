"""Markdown of the demo's model over weights in codes (examples/quantised_bases.py)."""

from __future__ import annotations

from . import markdown as md

HEAD = [
    "frozen weights",
    "bits a weight",
    "model, MB",
    "peak of a step above it, MB",
    "step, ms",
    "over fp32",
    "held-out accuracy",
]


def cells(rows: list[dict]) -> list[list[str]]:
    """A line below ``HEAD`` for each base, the first of which is that of the ratio."""
    return [
        [r["base"], f"{r['bits']:.2f}", f"{r['model_bytes'] / 1e6:.1f}",
         "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:.0f}", f"{r['median_ms']:.0f}",
         f"{r['median_ms'] / rows[0]['median_ms']:.2f}", f"{r['accuracy']:.1%}"] for r in rows
    ]  # fmt: skip


def title(rows: list[dict]) -> str:
    """What stands above."""
    first = rows[0]
    return (
        f"all-MiniLM-L6-v2, LoRA of rank {first['R']} on {first['layers']} linear layers, {first['steps']} steps of "
        f"{first['pairs']} pairs in {first['dtype']}; accuracy before {first['accuracy_before']:.1%}"
    )


def markdown(rows: list[dict], dtype: str) -> list[str]:
    """Lines for docs/usage.md."""
    return [title(rows), "", *md.table(HEAD, cells(rows))]

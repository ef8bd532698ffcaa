"""Markdown of the coverage table: all rows for docs/methods.md, and what is covered for README."""

from __future__ import annotations

import collections

from peftkern.methods.coverage import COVERED, NOT_YET, NOTHING, records

from .markdown import table


def _class(row: dict) -> str:
    return f"{row['class']}: {row['sub_class']}" if row["sub_class"] else row["class"]


def _what(row: dict) -> str:
    if row["status"] != COVERED:
        return f"{row['status']}: {row['note']}"
    by = "covered" if row["by"] == row["method"] else f"covered as {row['by']}"
    return f"**{by}**: {row['note']}" if row["note"] else f"**{by}**"


def whole() -> list[str]:
    """A line for every name, in the order of classes."""
    rows = [
        [row["method"], ", ".join(f"`{name}`" for name in row["called"]), _class(row), row["family"],
         f"`{row['op']}`" if row["op"] else "", ", ".join(row["backends"] or ()), row["tested_against"] or "",
         row["saves"] or "", _what(row)] for row in records()
    ]  # fmt: skip
    return table(
        [
            "method",
            "in libraries",
            "class",
            "family",
            "op",
            "back ends",
            "tested against",
            "saves for backward",
            "what",
        ],
        rows,
    )


def covered() -> list[str]:
    """A line for every entry of the registry that has a row, with the names that it serves beside its own; then how many
    names are what."""
    found = records()
    served: dict[str, list[dict]] = {}
    for row in found:
        if row["status"] == COVERED:
            served.setdefault(row["by"], []).append(row)
    rows = []
    for entry, own in served.items():
        first = own[0]
        rows.append(
            [entry, first["class"], ", ".join(r["method"] for r in own if r["method"] != entry),
             ", ".join(first["backends"]), first["tested_against"], first["saves"]]
        )  # fmt: skip
    count = collections.Counter(row["status"] for row in found)
    return [
        *table(["method", "class", "also", "back ends", "tested against", "saves for backward"], rows),
        f"{len(found)} names in [docs/methods.md](docs/methods.md): {count[COVERED]} covered, {count[NOTHING]} with nothing to "
        f"fuse, {count[NOT_YET]} not yet.",
        "",
    ]


PARTS = {"whole": whole, "covered": covered}

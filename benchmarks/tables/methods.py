"""Markdown of the coverage table: the entries of the registry and all names for docs/methods.md, a short one for README."""

from __future__ import annotations

import collections
import sys

from peftkern.methods import METHODS, STREAM
from peftkern.methods.coverage import COVERED, NOT_YET, NOTHING, records

from .markdown import table


def _what(row: dict) -> str:
    if row["status"] != COVERED:
        return f"{row['status']}: {row['note']}"
    by = COVERED if row["by"] == row["method"] else f"{COVERED} as {row['by']}"
    return f"**{by}**: {row['note']}" if row["note"] else f"**{by}**"


def _served(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by the entry that computes them, its own first."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["status"] == COVERED:
            found.setdefault(row["by"], []).append(row)
    return {entry: sorted(own, key=lambda r: r["method"] != entry) for entry, own in found.items()}


def _kind(entry: str) -> str:
    # What the folder of its file says that it holds.
    text = sys.modules[(METHODS.get(entry) or STREAM[entry]).folder].__doc__.partition(".")[0]
    return text[0].lower() + text[1:]


def entries() -> list[str]:
    """A line for every entry of the registry."""
    rows = [
        [entry, f"`{own[0]['op']}`", f"`{own[0]['function']}`" if own[0]["function"] else "",
         ", ".join(own[0]["backends"]), own[0]["tested_against"], own[0]["saves"], own[0]["merges"]]
        for entry, own in _served(records()).items()
    ]  # fmt: skip
    head = ["method", "op", "function", "back ends", "tested against", "saves for backward", "merges to"]
    return table(head, rows)


def names() -> list[str]:
    """A line for every name, in the order of classes."""
    rows = [
        [row["method"], ", ".join(f"`{name}`" for name in row["called"]), row["class"], row["sub_class"], row["family"],
         _what(row)] for row in records()
    ]  # fmt: skip
    return table(["method", "in libraries", "class", "sub-class", "family", "what"], rows)


def short() -> list[str]:
    """What is covered: a line for every folder of methods, with its names. Then how many names are what."""
    found, folders = records(), {}
    for entry, own in _served(found).items():
        also = ", ".join(r["method"] for r in own[1:])
        folders.setdefault(_kind(entry), []).append(f"{entry} ({also})" if also else entry)
    count = collections.Counter(row["status"] for row in found)
    return [
        *table(["an adapter is", "methods"], [[kind, ", ".join(names)] for kind, names in folders.items()]),
        f"{len(found)} names in [docs/methods.md](docs/methods.md): {count[COVERED]} covered, {count[NOTHING]} with nothing to "
        f"fuse, {count[NOT_YET]} not yet.",
        "",
    ]


PARTS = {"entries": entries, "names": names, "short": short}

"""``peftkern methods``: every method of the surveys and of the libraries, who computes it here, or why nobody has to."""

from __future__ import annotations

import argparse
import collections
import json
import shutil
import textwrap
from collections.abc import Sequence

from ...screen import Console, Table
from .row import COVERED, NOT_YET, NOTHING
from .table import records

STYLES = {COVERED: "bold", NOTHING: "dim", NOT_YET: ""}
NARROWEST = 32
FAMILIES = (
    "Families: L a GEMM and a linear branch; L+phi with an activation; B an activation in a branch on the residual; "
    "R on listed rows; S a transformed weight or input; P prompts; M masks."
)


def words(row: dict) -> str:
    """The last column: who computes it, where, and what is kept for backward, or why nobody does."""
    if row["status"] != COVERED:
        return f"{row['status']}: {row['note']}"
    if row["by"] != row["method"]:
        return f"as {row['by']}{': ' if row['note'] else ''}{row['note']}"
    note = f"{row['note']}; " if row["note"] else ""
    where = f"{row['op']} on {', '.join(row['backends'])}"
    return f"{note}{where}; tested against {row['tested_against']}; saves {row['saves']}"


def table(kind: str, rows: list[dict], width: int) -> Table:
    """The methods of one class, the last column wrapped to ``width`` characters in all."""
    heads = ("method", "sub-class", "family", "what")
    cells = [(row["method"], row["sub_class"], row["family"]) for row in rows]
    used = sum(2 + max(map(len, column)) for column in zip(heads, *cells))
    found = Table(kind, heads, left=heads)
    for row, first in zip(rows, cells):
        for i, line in enumerate(textwrap.wrap(words(row), max(NARROWEST, width - used - 4))):
            found.add(*(first if i == 0 else [""] * len(first)), line, style=STYLES[row["status"]])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="peftkern methods", description=__doc__)
    parser.add_argument("--json", action="store_true", help="all rows with all that is known, as JSON")
    parser.add_argument("--status", choices=tuple(STYLES), help="these rows alone")
    args = parser.parse_args(argv)
    rows = [row for row in records() if args.status in (None, row["status"])]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    console = Console()
    width = shutil.get_terminal_size((150, 24)).columns
    for kind in dict.fromkeys(row["class"] for row in rows):
        console.print(table(kind, [row for row in rows if row["class"] == kind], width))
    count = collections.Counter(row["status"] for row in rows)
    console.print(f"{len(rows)} methods: " + ", ".join(f"{count[s]} {s}" for s in STYLES if count[s]) + ".")
    console.print(textwrap.fill(FAMILIES, width))
    return 0

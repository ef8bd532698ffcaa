"""The coverage table: what is typed (the rows) beside what the registry says."""

from __future__ import annotations

from ..entry import Entry
from ..registry import METHODS
from ..residual import STREAM
from . import back_ends
from .additive import ADDITIVE
from .combined import COMBINED
from .reparameterised import REPARAMETERISED
from .row import COVERED, NOT_YET, NOTHING, Row
from .selective import SELECTIVE

ROWS: tuple[Row, ...] = (*ADDITIVE, *SELECTIVE, *REPARAMETERISED, *COMBINED)


def entry(row: Row) -> Entry | None:
    """The registry's entry that computes it, if it is there."""
    return METHODS.get(row.by) or STREAM.get(row.by)


def status(row: Row) -> str:
    """COVERED, NOTHING or NOT_YET."""
    return NOTHING if not row.fuses else NOT_YET if entry(row) is None else COVERED


def tested(method: Entry) -> str:
    """Libraries and releases that the tests compare with (``peft 0.18 to 0.21``), or the equation where no library has it."""
    if not method.tested:
        return "its equation"
    releases = {name: [".".join(map(str, r)) for r in span] for name, span in method.tested.items()}
    return ", ".join(f"{name} {' to '.join(dict.fromkeys(span))}" for name, span in releases.items())


def record(row: Row) -> dict:
    """The row with all that is known of it, as ``peftkern methods --json`` prints it. What only an entry of the registry
    knows is None without one."""
    method, note = entry(row), row.note
    if method is None and row.by is not None:
        note = (
            f"an entry of the registry{f' for {row.by}' if row.by != row.method else ''}{f'; {note}' if note else ''}"
        )
    if method is not None and row.by == row.method:
        kinds = ", ".join(m.name.removeprefix(f"{m.of} of ") for m in METHODS.values() if m.of == method.name)
        note = "; ".join(filter(None, (note, kinds and f"also of {kinds}")))
    return {
        "method": row.method,
        "class": row.kind,
        "sub_class": row.part,
        "family": row.family,
        "status": status(row),
        "by": method and method.name,
        "example": row.example if method else None,
        "op": method and method.op,
        "function": method and method.function and method.function.__name__,
        "backends": method and back_ends.of(method),
        "many_adapters": method and method.serves_many,
        "tested_against": method and tested(method),
        "saves": method and method.saves,
        "merges": method and method.merges,
        "note": note,
        "called": list(row.called),
    }


def records() -> list[dict]:
    """All rows, by class."""
    return [record(row) for row in ROWS]

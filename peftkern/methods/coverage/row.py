"""A row of the coverage table: one name of the literature or of a library, and who serves it or why nobody has to.

What is typed here is what the registry cannot know: classes, families and reasons. The op, back ends, tested releases
and what is saved are read from the registry's entry, so a row whose entry is not there says "not yet" by itself.
"""

from __future__ import annotations

from typing import NamedTuple

COVERED, NOTHING, NOT_YET = "covered", "nothing to fuse", "not yet"


class Row(NamedTuple):
    """One name.

    ``family``: of kernels (L: a GEMM and a linear branch; L+phi: the same with an activation; B: an activation in a
    branch on the residual; R: the same on listed rows; S: a transformed weight or input; P: prompts; M: masks), empty
    without a computation of its own. ``by``: the entry of the registry that computes it. ``example``: the one of the
    entry's examples that shows it, None for any. ``note``: what is particular, the reason why there is nothing to fuse
    (``fuses`` False), or what it would need. ``called``: names that libraries have for it (``peft.LORA``).
    ``kind``, ``part``: its class and sub-class in the surveys.
    """

    method: str
    family: str = ""
    by: str | None = None
    example: str | None = None
    note: str = ""
    fuses: bool = True
    called: tuple[str, ...] = ()
    kind: str = ""
    part: str = ""


def by(
    method: str, entry: str, note: str = "", *, example: str | None = None, family: str = "L", called: str = ""
) -> Row:
    """A method that this entry of the registry computes. ``called``: names with spaces between."""
    return Row(method, family, entry, example, note, True, tuple(called.split()))


def later(method: str, family: str, need: str, called: str = "") -> Row:
    """A method that nothing here computes yet, and what it would need."""
    return Row(method, family, note=need, called=tuple(called.split()))


def nothing(method: str, reason: str, family: str = "", called: str = "") -> Row:
    """A method without anything to fuse, and why."""
    return Row(method, family, note=reason, fuses=False, called=tuple(called.split()))


def section(kind: str, part: str, *rows: Row) -> tuple[Row, ...]:
    """These rows, in this class and sub-class of the surveys."""
    return tuple(row._replace(kind=kind, part=part) for row in rows)

"""Machine code as nvdisasm prints it: instructions, and how many of each kind that matters.

Kinds are named after the instruction and, for accesses of global memory, the bits that one thread moves: ``LDG.128``,
``STG.16``, ``LDGSTS.128`` (copies into shared memory, cp.async). ``HMMA`` is mma.sync, ``HGMMA`` wgmma, ``UTCMMA``
tcgen05.mma; ``UTMALDG`` and ``UTMASTG`` are tile copies by the TMA unit, ``UBLKCP`` its copies of rows of bytes.
"""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass
from typing import NamedTuple

# A section, a label or an instruction: one search in text of a million lines.
_LINE = re.compile(
    r"^[ \t]*(?:\.section[ \t]+\.text\.([^\s,]+)|(\S+):[ \t]*$"
    r"|/\*[0-9a-f]+\*/[ \t]+(?:@(!?U?P\w+)[ \t]+)?([A-Z][\w.]*)[ \t]*([^\n]*?)[ \t]*;)",
    re.M,
)
_WIDTH = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_FLOAT = re.compile(r"^(F16|F16x2|BF16|BF16x2|BF16_V2|F32|F32x2|F64|FTZ)$", re.I)
WIDE = 128  # bits; an access of fewer is narrow


class Instruction(NamedTuple):
    """``guard``: the predicate on which it runs, or "". ``name``: with its modifiers."""

    guard: str
    name: str
    operands: str

    @property
    def parts(self) -> list[str]:
        """The name, then the modifiers."""
        return self.name.split(".")


@dataclass(frozen=True)
class Function:
    """The code of one kernel, its subroutines included. ``labels``: index of the instruction that each stands before."""

    name: str
    code: tuple[Instruction, ...]
    labels: dict[str, int]


def functions(text: str) -> list[Function]:
    """The kernels of one ``nvdisasm -c``."""
    found: list[tuple[str, list[Instruction], dict[str, int]]] = []
    for section, label, guard, name, operands in _LINE.findall(text):
        if section:
            found.append((section, [], {}))
        elif found and label:
            found[-1][2][label] = len(found[-1][1])
        elif found:
            found[-1][1].append(Instruction(guard, name, operands))
    return [Function(name, tuple(code), labels) for name, code, labels in found]


def instructions(text: str) -> list[Instruction]:
    """Those of one ``nvdisasm --binary``."""
    return [Instruction(*found) for _, _, *found in _LINE.findall(text) if found[1]]


def _kind(parts: list[str]) -> str | None:
    name, modifiers = parts[0], parts[1:]
    if name in ("LDG", "STG", "LDGSTS", "LD", "ST"):
        # Generic accesses count as global ones: nothing here reads shared memory through a generic pointer.
        name = name if name.startswith("LDG") or name == "STG" else name + "G"
        return f"{name}.{next((_WIDTH[m] for m in modifiers if m in _WIDTH), 32)}"
    if name in ("LDL", "STL", "HMMA", "HGMMA", "UTMALDG", "UTMASTG", "UBLKCP", "USETMAXREG"):
        return name
    if name.startswith("UTC") and name.endswith("MMA"):
        return "UTCMMA"
    if name.startswith(("RED", "ATOM")) and not name.startswith("REDUX"):
        # Shared memory has no float addition: it is a loop around ATOMS.CAST.
        return "float atomic" if any(map(_FLOAT.match, modifiers)) or "CAST" in modifiers else "atomic"
    return "float atomic" if name in ("UTMAREDG", "UBLKRED") else None


def mix(function: Function) -> dict[str, int]:
    """Instructions of each kind, only kinds that occur."""
    counts: collections.Counter[str] = collections.Counter()
    for name, count in collections.Counter(i.name for i in function.code).items():
        if kind := _kind(name.split(".")):
            counts[kind] += count
    return dict(sorted(counts.items()))


def narrow(kind: str) -> bool:
    """Whether it is an access of global memory that moves less than a thread could."""
    name, _, bits = kind.partition(".")
    return name in ("LDG", "STG", "LDGSTS") and int(bits) < WIDE

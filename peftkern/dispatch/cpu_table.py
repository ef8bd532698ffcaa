"""What was measured on a CPU model: which kind of base product takes the least time. The choice itself: cpu_base.

A table is a file ``cpu-VENDOR-FAMILY-MODEL-ISA.json`` of the package, or of the user, written by ``peftkern tune --cpu``. It
speaks for the models that it names and for the instruction sets it was measured at.

- ``rows``: microseconds for one dtype, pass, D and C, over numbers of rows M: those of a native pass of lora_linear, rank 16,
  with an (M, C) x (C, D) product, so that an epilogue's pass over the result is part of the time.
- ``least``: the least work that is worth our code, by what is computed (least.py).
- ``rates``: GFLOP/s of multiply-adds in registers, by dtype, and GB/s of a copy: what no kernel exceeds. Nobody reads them here.

Nothing is measured at run time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..problem import DTYPES
from .table_files import read_all, slug

SCHEMA = 1
KINDS = ("vendor", "few", "panels", "bf16", "amx")
# Ours is chosen where it takes at most so much of the vendor's time: medians of quiet runs differ by 2 to 3 %.
WINS = 0.95
# A row speaks for products whose sizes are within this factor of its own; its largest M for any larger one too, since
# both sides then work through more blocks of the same kind.
NEAR = 2


class CpuModel(NamedTuple):
    """Vendor, family and model of a processor as CPUID gives them."""

    vendor: str
    family: int
    model: int


class Level(NamedTuple):
    """What else decides how fast either side is: our instruction set, torch's, and whether its fp32 product is MKL's."""

    isa: str
    torch_isa: str
    mkl: bool


class Product(NamedTuple):
    """(M, C) x (C, D). ``unit_stride``: W is adjacent along C or D; ``scaled``: the left side is multiplied by a vector;
    ``coded``: W is quantised; ``integers``: and the left side is rounded to meet its codes.
    """

    dtype: torch.dtype
    forward: bool
    M: int
    D: int
    C: int
    unit_stride: bool = True
    scaled: bool = False
    coded: bool = False
    integers: bool = False


class Row(NamedTuple):
    """Candidates for one product, for each number of rows, fastest first."""

    D: int
    C: int
    M: tuple[int, ...]
    order: tuple[tuple[str, ...], ...]


class Table:
    """The content of a file; two tables are equal if they are the same object."""

    def __init__(self, data: dict[str, Any], name: str):
        """Raises ValueError, which names the file, for content that makes no sense."""
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{name}: schema {data.get('schema')!r}, expected {SCHEMA}")
        self.name, self.meta = name, data["meta"]
        self.least: dict[str, int] = data.get("least", {})
        if not all(isinstance(amount, int) and amount >= 0 for amount in self.least.values()):
            raise ValueError(f"{name}: expected counts of work: {self.least}")
        self.rows: dict[tuple[torch.dtype, bool], list[Row]] = {}
        for row in data["rows"]:
            times, counts = row["us"], row["M"]
            if not set(times) <= set(KINDS) or any(len(t) != len(counts) for t in times.values()):
                raise ValueError(f"{name}: expected times of {', '.join(KINDS)}, one for each M: {row}")
            if list(counts) != sorted(set(counts)) or not counts or row["pass"] not in ("forward", "dx"):
                raise ValueError(f"{name}: expected rising M, and forward or dx for the pass: {row}")
            order = tuple(_order({kind: t[i] for kind, t in times.items()}) for i in range(len(counts)))
            rows = self.rows.setdefault((DTYPES[row["dtype"]], row["pass"] == "forward"), [])
            rows.append(Row(row["D"], row["C"], tuple(counts), order))


def _order(us: dict[str, float | None]) -> tuple[str, ...]:
    # Null: too slow to be timed, or not for so many rows.
    timed = [kind for kind in KINDS if us.get(kind) is not None]
    return tuple(sorted(timed, key=lambda kind: us[kind] * (WINS if kind == "vendor" else 1.0)))


def _off(a: int, b: int) -> float:
    return max(a / b, b / a)


class Near(NamedTuple):
    """The row of a table, and its number of rows M, that speak for a product. ``order``: the kinds, fastest first."""

    D: int
    C: int
    M: int
    order: tuple[str, ...]

    def __str__(self) -> str:
        return f"D={self.D} C={self.C} M={self.M}"


@functools.lru_cache(256)
def _row(table: Table, dtype: torch.dtype, forward: bool, D: int, C: int) -> Row | None:
    # A report asks for thousands of M of one layer.
    close = [r for r in table.rows.get((dtype, forward), ()) if max(_off(D, r.D), _off(C, r.C)) <= NEAR]
    return min(close, key=lambda r: (_off(D, r.D) * _off(C, r.C), r.D, r.C), default=None)


def nearest(table: Table, p: Product) -> Near | None:
    """What speaks for a product; None where nothing near was measured, or there is nothing to compute."""
    if 0 in (p.M, p.D, p.C):
        return None
    row = _row(table, p.dtype, p.forward, p.D, p.C)
    if row is None:
        return None
    i = min(range(len(row.M)), key=lambda i: (_off(p.M, row.M[i]), row.M[i]))
    if p.M > row.M[-1] or _off(p.M, row.M[i]) <= NEAR:
        return Near(row.D, row.C, row.M[i], row.order[i])
    return None


def file_name(cpu: CpuModel, isa: str) -> str:
    """``cpu-authenticamd-25-1-avx2.json``; ``isa``: ours, since virtual machines of one model differ in what they offer."""
    return f"cpu-{slug(cpu.vendor)}-{cpu.family}-{cpu.model}-{isa}.json"


def of_model(cpu: CpuModel, folders: Sequence[str], level: Level | None = None) -> Table | None:
    """The table of a CPU model in the first of the folders that has one; of two, the one that names fewer models.

    ``level``: of those that were measured at it, else whatever the instruction sets.
    """
    found: dict[str, list[tuple[int, str, Table]]] = {}
    pattern = f"cpu-{slug(cpu.vendor)}-{cpu.family}-*.json"
    for folder, table in read_all(folders, pattern, Table) if cpu.vendor else ():
        named = table.meta["cpu"]
        first, last = named["models"]
        here = (named["vendor"], named["family"]) == cpu[:2] and first <= cpu.model <= last
        if here and (level is None or applies(table, level)):
            found.setdefault(folder, []).append((last - first, table.name, table))
    closest = next(iter(found.values()), ())
    return min(closest, key=lambda entry: entry[:2], default=(math.inf, "", None))[2]


def least(table: Table | None, folders: Sequence[str]) -> dict[str, int]:
    """The least work that is worth our code, by name: as the table has it, else the most that any table in ``folders`` says."""
    most: dict[str, int] = {}
    for _, other in read_all(folders, "cpu-*.json", Table):
        most |= {name: max(amount, most.get(name, 0)) for name, amount in other.least.items()}
    return most if table is None else most | table.least


def applies(table: Table, level: Level) -> bool:
    """Whether it was measured at these instruction sets and against this library."""
    return Level(*(table.meta["level"][field] for field in Level._fields)) == level

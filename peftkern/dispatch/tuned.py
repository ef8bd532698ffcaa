"""What was measured on a GPU: which candidate computes a problem in the least time.

A table is a file NAME.json, NAME being the device's own (``slug``), in the user's folder or else in that of the package.
``peftkern tune`` writes it. A row says what is fastest for one op, pair of dtypes, N, K and R, with or without dropout, near
one number of rows. Nothing is measured here: where no row is near, there is no choice, and callers do what they did.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from ..bases.base import KINDS
from ..problem import Problem, short
from ..settings import CANDIDATES, Settings
from .table_files import read_all, slug

SCHEMA = 1
# Rows are measured without the other options, which cost the candidates differently.
_OPTIONS = frozenset({"base", "bias", "dropout", "need_x", "need_A", "need_B", "need_bias", "need_weights"})


class Key(NamedTuple):
    """What must agree exactly. ``base``: the kind of a weight in codes, empty for others."""

    op: str
    dtype: str
    adapter_dtype: str
    dropout: bool
    N: int
    K: int
    R: int
    base: str = ""


class Entry(NamedTuple):
    """The fastest candidate, and the launch configuration that made it so: None is the candidate's own."""

    candidate: str
    config: dict[str, Any] | None = None


def file_name(device: str) -> str:
    """Of a GPU's table."""
    return f"{slug(device)}.json"


def bucket(M: int) -> int:
    """The power of two nearest to M, as a ratio; 0 for an op without rows."""
    if M == 0:
        return 0
    low = 1 << (M.bit_length() - 1)
    return low if M * M < 2 * low * low else 2 * low


def parse(data: dict, name: str) -> dict[Key, dict[int, Entry]]:
    """Rows of a table by key and bucket. Raises ValueError for a table that makes no sense, and names it."""
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{name}: schema {data.get('schema')!r}, expected {SCHEMA}")
    found: dict[Key, dict[int, Entry]] = {}
    for row in data["rows"]:
        if row["choice"] not in CANDIDATES:
            raise ValueError(f"{name}: no candidate {row['choice']!r}")
        key = Key(*(row[field] for field in Key._fields[:-1]), row.get("base", ""))
        near = found.setdefault(key, {})
        if bucket(row["M"]) in near:
            raise ValueError(f"{name}: two rows for {key} near M={bucket(row['M'])}")
        near[bucket(row["M"])] = Entry(row["choice"], row.get("config"))
    return found


@functools.cache
def table(folders: tuple[str, ...], device: str) -> dict[Key, dict[int, Entry]]:
    """The table of a device in the first of the folders that has one, read once; empty if none has."""
    return next((rows for _, rows in read_all(folders, file_name(device), parse)), {})


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def lookup(rows: dict[Key, dict[int, Entry]], problem: Problem) -> Entry | None:
    """The entry of the same sizes and dtypes whose number of rows is nearest, at most a factor of two away."""
    base = next(iter(problem.flags & KINDS.keys()), "")
    if not problem.flags - {base} <= _OPTIONS:
        return None
    dtype, adapter = short(problem.dtype), short(problem.adapter_dtype)
    key = Key(problem.op, dtype, adapter, "dropout" in problem.flags, problem.N, problem.K, problem.R, base)
    here, near = bucket(problem.M), rows.get(key, {})
    if here == 0 or not near:
        return near.get(0)
    close = [m for m in near if here <= 2 * m and m <= 2 * here]
    return near[min(close, key=lambda m: (abs(math.log2(problem.M / m)), m))] if close else None


def entry(problem: Problem, now: Settings) -> Entry | None:
    """The fastest for this problem, None if nothing near it was measured, or if bits must not depend on the number of
    rows. A candidate that the settings name is the fastest of every problem."""
    if now.candidate != "measured":
        return None if now.candidate == "none" else Entry(now.candidate)
    if now.batch_invariant or not (now.gpu or problem.device == "cuda"):
        return None
    return lookup(table(now.tables, now.gpu or _device_name(torch.cuda.current_device())), problem)

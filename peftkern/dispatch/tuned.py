"""What was measured on a GPU: which candidate computes a problem in the least time.

A table is a file of the package, tuned/NAME.json, NAME being the device's own (``slug``). ``peftkern bench --tune``
writes it. A row says what is fastest for one op, pair of dtypes, N, K and R, with or without dropout, near one number
of rows. Nothing is measured here: where no row is near, there is no choice, and callers do what they did.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import settings
from ..problem import Problem

FOLDER = Path(__file__).parents[1] / "tuned"
SCHEMA = 1
# Those of kernels/tl/configs.py (BASES), for ops without a product Triton as such, the CUDA kernels, and plain torch.
CANDIDATES = ("addmm", "epilogue", "overlap", "fused", "triton", "cuda", "reference")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Rows are measured without the other options, which cost the candidates differently.
_OPTIONS = frozenset({"base", "bias", "dropout", "need_x", "need_A", "need_B", "need_bias"})


class Key(NamedTuple):
    """What must agree exactly."""

    op: str
    dtype: str
    adapter_dtype: str
    dropout: bool
    N: int
    K: int
    R: int


class Entry(NamedTuple):
    """The fastest candidate, and the launch configuration that made it so: None is the candidate's own."""

    candidate: str
    config: dict[str, Any] | None = None


def slug(device: str) -> str:
    """``NVIDIA H100 80GB HBM3`` as a file name: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


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
        key = Key(*(row[field] for field in Key._fields))
        near = found.setdefault(key, {})
        if bucket(row["M"]) in near:
            raise ValueError(f"{name}: two rows for {key} near M={bucket(row['M'])}")
        near[bucket(row["M"])] = Entry(row["choice"], row.get("config"))
    return found


@functools.cache
def table(device: str) -> dict[Key, dict[int, Entry]]:
    """The packaged table of a device, read once; empty if there is none."""
    file = FOLDER / f"{slug(device)}.json"
    return parse(json.loads(file.read_text()), file.name) if file.is_file() else {}


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def lookup(rows: dict[Key, dict[int, Entry]], problem: Problem) -> Entry | None:
    """The entry of the same sizes and dtypes whose number of rows is nearest, at most a factor of two away."""
    if not problem.flags <= _OPTIONS:
        return None
    dtype, adapter = DTYPES.get(problem.dtype), DTYPES.get(problem.adapter_dtype)
    key = Key(problem.op, dtype, adapter, "dropout" in problem.flags, problem.N, problem.K, problem.R)
    here, near = bucket(problem.M), rows.get(key, {})
    if here == 0 or not near:
        return near.get(0)
    close = [m for m in near if here <= 2 * m and m <= 2 * here]
    return near[min(close, key=lambda m: (abs(math.log2(problem.M / m)), m))] if close else None


_forced: Entry | None = None


@contextlib.contextmanager
def forced(candidate: str | None) -> Iterator[None]:
    """Inside, every problem's choice is ``candidate`` (None: no choice), whatever was measured. For tests and tuning.

    Process-wide. Dispatch remembers what took a call: ``dispatch.forget()`` makes it ask again.
    """
    global _forced
    if candidate not in (None, *CANDIDATES):
        raise ValueError(f"candidate is {candidate!r}, expected one of {', '.join(CANDIDATES)}")
    before, _forced = _forced, Entry(candidate or "")
    try:
        yield
    finally:
        _forced = before


def entry(problem: Problem, device: str | None = None) -> Entry | None:
    """The fastest for this problem on ``device`` (a name; default: the current CUDA device), None if nothing near it
    was measured, or if bits must not depend on the number of rows."""
    if _forced is not None:
        return _forced if _forced.candidate else None
    if settings.current().batch_invariant or (device is None and problem.device != "cuda"):
        return None
    return lookup(table(_device_name(torch.cuda.current_device()) if device is None else device), problem)


def choice(problem: Problem, device: str | None = None) -> str | None:
    """Name of the fastest candidate, see ``entry``."""
    found = entry(problem, device)
    return None if found is None else found.candidate

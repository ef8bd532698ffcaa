"""The floor of a linear layer with many adapters, and of its branch alone; core/floor.py says what a floor is.

M' of the M rows have an adapter; S is the sum of their adapters' ranks over those rows, U the sum of the ranks of the
adapters that have a row at all: only their weights have to be read.

    base          as in core/floor.py, for all M rows
    branch_flops  forward 2 S (K+N), forward + backward 6 S (K+N)
    branch_bytes  forward  e M'K + a U (K+N)
                  backward e M'(N+K) + 2 a U (K+N)
    the branch alone, forward: no base; e (M'K + MN) + a U (K+N), since it has to write y itself
    the same, added to a y that is there: e (M'K + 2 M'N) + a U (K+N)
"""

from __future__ import annotations

import dataclasses
import functools

from ..core.case import Case, Floor
from ..core.floor import lora_floor
from .populations import adapter_ids, adapter_ranks


@functools.lru_cache(maxsize=4096)
def _counts(mix: str, adapters: int, M: int, base_share: float, kind: str, R: int) -> tuple[int, int, int]:
    ids, ranks = adapter_ids(mix, adapters, M, base_share), adapter_ranks(kind, R, adapters)
    taken, rows = ids[ids >= 0].unique(return_counts=True)
    pairs = [(ranks[a], n) for a, n in zip(taken.tolist(), rows.tolist(), strict=True)]
    return int((ids >= 0).sum()), sum(r * n for r, n in pairs), sum(r for r, _ in pairs)


def counts(case: Case) -> tuple[int, int, int]:
    """(M', S, U) of a case."""
    return _counts(case.mix, case.adapters, case.M, case.base_share, case.ranks, case.R)


def multi_floor(case: Case, which: str) -> Floor:
    """FLOPs and bytes of the layer for the pass ``fwd`` or ``fwd_bwd``."""
    (rows, rank_rows, used), both = counts(case), case.K + case.N
    e, a = case.dtype.itemsize, case.adapter_dtype.itemsize
    branch_bytes = e * rows * case.K + a * used * both
    if which == "fwd_bwd":
        branch_bytes += e * rows * both + 2 * a * used * both
    flops = (2.0 if which == "fwd" else 6.0) * rank_rows * both
    return dataclasses.replace(lora_floor(case, which), branch_flops=flops, branch_bytes=float(branch_bytes))


def branch_floor(case: Case, which: str) -> Floor:
    """FLOPs and bytes of the branch alone, forward (whatever ``which``: it has no other pass here)."""
    (rows, rank_rows, used), both = counts(case), case.K + case.N
    moved = case.dtype.itemsize * (rows * case.K + case.M * case.N) + case.adapter_dtype.itemsize * used * both
    return Floor(0.0, 2.0 * rank_rows * both, 0.0, float(moved))


def add_floor(case: Case, which: str) -> Floor:
    """The same for a branch that is added to a y that is there: rows with an adapter are read and written."""
    (rows, rank_rows, used), both = counts(case), case.K + case.N
    moved = case.dtype.itemsize * rows * (case.K + 2 * case.N) + case.adapter_dtype.itemsize * used * both
    return Floor(0.0, 2.0 * rank_rows * both, 0.0, float(moved))

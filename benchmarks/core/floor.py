"""The floor of a LoRA linear layer: a lower bound to compare measured times with.

Time is modelled as what the frozen base takes (measured in the same run), plus the branch's FLOPs at the rate that
the base reaches, plus the branch's bytes at the measured copy bandwidth (bytes read and written per second).

    floor_ratio = 1 + (branch_flops / (base_flops / base_time) + branch_bytes / bandwidth) / base_time

For M rows, K in, N out, e bytes per activation and a bytes per adapter element. M' of the rows have an adapter; S is the
sum of their adapters' ranks over those rows, U the sum of the ranks of the adapters that have a row at all: only their
weights have to be read. With one adapter of rank R, M' = M, S = M R and U = R.

    base_flops    forward 2MKN, forward + backward 4MKN (the weight is frozen: there is no third product)
    branch_flops  forward 2 S (K+N), forward + backward 6 S (K+N)
    branch_bytes  forward  e M'K (x for u) + a U (K+N)
                  backward e M'N (dy for dB and dS in one pass) + e M'K (x for dA) + 2 a U (K+N) (adapters and gradients)
    base_bytes    e (MK + KN + MN) for each product
    the branch alone, forward: no base; e (M'K + MN) + a U (K+N), since it has to write y itself
    the same, added to a y that is there: e (M'K + 2 M'N) + a U (K+N)

y and dx get their branch term while the base product writes them, and dropout is drawn again from its seed: neither
costs bytes. ``bytes_bound_fraction`` is (base_bytes + branch_bytes) / bandwidth over the measured time: at 1 the
provider runs at copy bandwidth. Data that stays in a cache can push it above 1, and a provider that beats the
vendor's product can go below the floor. Where the frozen linear of the dtype is skipped as hopelessly slow, the
frozen fp32 linear takes its place in the floor.
"""

from __future__ import annotations

import functools

from .case import Case, Floor
from .populations import adapter_ids, adapter_ranks


@functools.lru_cache(maxsize=4096)
def _counts(mix: str, adapters: int, M: int, base_share: float, kind: str, R: int) -> tuple[int, int, int]:
    ids, ranks = adapter_ids(mix, adapters, M, base_share), adapter_ranks(kind, R, adapters)
    taken, rows = ids[ids >= 0].unique(return_counts=True)
    pairs = [(ranks[a], n) for a, n in zip(taken.tolist(), rows.tolist(), strict=True)]
    return int((ids >= 0).sum()), sum(r * n for r, n in pairs), sum(r for r, _ in pairs)


def counts(case: Case) -> tuple[int, int, int]:
    """(M', S, U) of a case."""
    if not case.many:
        return case.M, case.M * case.R, case.R
    return _counts(case.mix, case.adapters, case.M, case.base_share, case.ranks, case.R)


def layer_floor(case: Case, which: str) -> Floor:
    """FLOPs and bytes of the layer for the pass ``fwd`` or ``fwd_bwd``."""
    M, K, N, (rows, rank_rows, used) = case.M, case.K, case.N, counts(case)
    e, a = case.dtype.itemsize, case.adapter_dtype.itemsize
    passes = 1 if which == "fwd" else 2
    branch_bytes = e * rows * K + a * used * (K + N)
    if which == "fwd_bwd":
        branch_bytes += e * rows * (N + K) + 2 * a * used * (K + N)
    return Floor(
        base_flops=2.0 * passes * M * K * N,
        branch_flops=(2.0 if which == "fwd" else 6.0) * rank_rows * (K + N),
        base_bytes=float(e * passes * (M * K + K * N + M * N)),
        branch_bytes=float(branch_bytes),
    )


def branch_floor(case: Case, which: str) -> Floor:
    """FLOPs and bytes of the branch alone, forward (whatever ``which``: it has no other pass here)."""
    rows, rank_rows, used = counts(case)
    moved = case.dtype.itemsize * (rows * case.K + case.M * case.N)
    moved += case.adapter_dtype.itemsize * used * (case.K + case.N)
    return Floor(0.0, 2.0 * rank_rows * (case.K + case.N), 0.0, float(moved))


def add_floor(case: Case, which: str) -> Floor:
    """The same for a branch that is added to a y that is there: rows with an adapter are read and written."""
    rows, rank_rows, used = counts(case)
    moved = case.dtype.itemsize * rows * (case.K + 2 * case.N)
    moved += case.adapter_dtype.itemsize * used * (case.K + case.N)
    return Floor(0.0, 2.0 * rank_rows * (case.K + case.N), 0.0, float(moved))


def floor_ratio(floor: Floor, base_seconds: float, bandwidth: float) -> float:
    """Least possible time over the frozen linear's. ``bandwidth`` in bytes per second."""
    share = floor.branch_flops / floor.base_flops if floor.branch_flops else 0.0
    return 1.0 + share + floor.branch_bytes / bandwidth / base_seconds


def bytes_bound_fraction(floor: Floor, seconds: float, bandwidth: float) -> float:
    """Share of ``seconds`` that moving the compulsory bytes takes at ``bandwidth``."""
    return (floor.base_bytes + floor.branch_bytes) / bandwidth / seconds

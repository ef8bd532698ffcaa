"""The floors of a LoRA linear layer: lower bounds to compare measured times with.

The FLOPs floor is all FLOPs at the peak of the dtype, the bytes floor all bytes at copy bandwidth (read and written per
second), both rates measured in the same run: the peak is that of multiply-adds in registers on a CPU, of a large product on
a GPU. Nobody is below the FLOPs floor.

    flops_bound_fraction = (base_flops + branch_flops) / peak / time
    bytes_bound_fraction = (base_bytes + branch_bytes) / bandwidth / time
    floor_ratio          = the longer of the two floors / the frozen linear's time; floor_by says which one it is

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
costs bytes. Data that stays in a cache can push ``bytes_bound_fraction`` above 1. Where the frozen linear of the dtype is
skipped as hopelessly slow, the frozen fp32 linear takes its place in the floor (``floor_over``).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

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


class Least(NamedTuple):
    """Seconds of both floors; ``flops`` is None where no peak is known."""

    flops: float | None
    bytes: float

    @property
    def bound(self) -> tuple[float, str] | tuple[None, None]:
        """The longer one and its name, ``flops`` or ``bytes``; none where one is unknown."""
        if self.flops is None:
            return None, None
        return max((self.flops, "flops"), (self.bytes, "bytes"))


def least(floor: Floor, peak: float | None, bandwidth: float) -> Least:
    """What the FLOPs and bytes of ``floor`` take at ``peak`` and ``bandwidth``, both per second."""
    flops = floor.base_flops + floor.branch_flops
    return Least(flops / peak if peak else None, (floor.base_bytes + floor.branch_bytes) / bandwidth)

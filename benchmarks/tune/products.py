"""Whose base product is faster on this CPU model, the vendor's or one of ours: the rows of its table.

Kinds of product take turns within a run; with few rows copies of W take turns as well, since a layer's W comes from memory in
a model. What is timed is what a layer runs: the native pass of lora_linear at rank 16, with its result's memory. Shapes come
in order of importance, fp32 first.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.backends.cpu import call as cpu_call
from peftkern.backends.cpu import native as cpu_native
from peftkern.problem import DTYPES
from peftkern.settings import current, using

from ..core import machine

# (D, C) of the (M, C) x (C, D) product: square layers; projections and MLP of an 8B model; what is left of a grid of 32
# to 2048, so that a table speaks for every layer of 16 to 4096.
SHAPES = (
    (4096, 4096), (1024, 1024), (256, 256), (2048, 2048), (512, 512), (128, 128), (32, 32),
    (14336, 4096), (4096, 14336), (1024, 4096), (4096, 1024),
    (2048, 512), (512, 2048), (512, 128), (128, 512), (128, 32), (32, 128),
    (2048, 128), (128, 2048), (512, 32), (32, 512), (2048, 32), (32, 2048),
)  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Rows of a product that has more than this many multiply-adds are left out: the next smaller number speaks for them.
MOST_WORK = 32 << 30
PASSES = ("forward", "dx")
RANK = 16
ONLY_DX = 1  # the first bit of equation.Needs
# A vendor's half-precision product this many times slower than the best of ours is not timed, and where it was so for two
# numbers of rows from HOPELESS_ROWS on not tried again with more: one could be a disturbance, and what is not in a table is
# never chosen. fp32 is hopeless nowhere.
HOPELESS, HOPELESS_ROWS = 3.0, 8
# Seconds and rounds that one number of rows gets: small calls, which differ more from one to the next, many rounds.
BUDGET, FEWEST, MOST = 0.15, 3, 500


class Job(NamedTuple):
    """One row of the table. ``dtype`` is a short word."""

    dtype: str
    which: str
    D: int
    C: int

    def rows(self, most: int = MOST_WORK) -> tuple[int, ...]:
        """Numbers of rows that are measured."""
        return tuple(M for M in ROWS if M * self.D * self.C <= most)


def planned(dtypes: Sequence[str]) -> list[Job]:
    """In order of importance."""
    return [Job(dtype, which, D, C) for dtype, (D, C), which in itertools.product(dtypes, SHAPES, PASSES)]


def measure(job: Job, rows: Sequence[int] | None = None) -> dict:
    """The row of one shape: for each kind its median microseconds at each number of rows, None where it was not timed."""
    counts = job.rows() if rows is None else tuple(rows)
    us: dict[str, list[float | None]] = {}
    dtype, size = DTYPES[job.dtype], (job.D, job.C) if job.which == "forward" else (job.C, job.D)
    copies = max(1, min(8, -(-2 * machine.cache_bytes("cpu") // (job.D * job.C * dtype.itemsize))))
    weights = [torch.randn(size).to(dtype) for _ in range(copies)]
    hopeless = 0
    for i, M in enumerate(counts):
        calls = dict(calls_of(job, M, weights))
        if hopeless == 2:
            del calls["vendor"]
        first = {kind: seconds(call, 0) for kind, call in calls.items()}
        if "vendor" in calls and job.dtype != "fp32":
            limit = HOPELESS * min(first.values())
            # Asked again: a first call may be slow for other reasons.
            if first["vendor"] > limit and seconds(calls["vendor"], 1) > limit:
                hopeless += M >= HOPELESS_ROWS
                del calls["vendor"]
            else:
                hopeless = 0
        for kind, median in _medians(calls, first).items():
            us.setdefault(kind, [None] * len(counts))[i] = round(median * 1e6, 2)
    return {"dtype": job.dtype, "pass": job.which, "D": job.D, "C": job.C, "M": list(counts), "us": us}


def calls_of(job: Job, M: int, weights: list[Tensor]) -> Iterator[tuple[str, Callable[[int], None]]]:
    """The native pass by each kind that can compute its product, as a function of the round."""
    dtype, few = DTYPES[job.dtype], M <= cpu_native.FEW_ROWS
    # Many rows read W from a cache whoever computes.
    weights = weights if few else weights[:1]
    (N, K), threads, a = weights[0].shape, torch.get_num_threads(), torch.randn(M, job.C).to(dtype)
    A, B = torch.randn(RANK, K), torch.randn(N, RANK)

    def arguments(weight: Tensor) -> tuple:
        if job.which == "forward":
            return threads, a, "dense", weight, A, B, None, 1.0, 0.0, None, None, False, False
        return threads, a, None, None, None, "dense", weight, A, B, 1.0, 0.0, None, None, ONLY_DX, K, RANK, A.dtype

    ways = {"forward": (cpu_call.forward, cpu_call.learn_forward), "dx": (cpu_call.backward, cpu_call.learn_backward)}
    half = dtype == torch.bfloat16
    pairs, tiles = half and cpu_native._C.base_gemm_bf16_usable(), half and cpu_native._C.base_gemm_amx_usable()
    able = {"vendor": True, "panels": not pairs, "bf16": pairs, "amx": tiles, "few": few}
    for kind in (kind for kind, can in able.items() if can):
        with using(cpu_kind=kind):
            now = current()  # under which the native pass remembers who computes
        given = [(now, *arguments(weight)) for weight in weights]

        def call(turn: int, given: list[tuple] = given, kind: str = kind) -> None:
            cpu_call.answered(*ways[job.which], given[turn % len(given)], kind)

        yield kind, call


def seconds(call: Callable[[int], None], turn: int) -> float:
    """What one call takes."""
    start = time.perf_counter()
    call(turn)
    return time.perf_counter() - start


def _medians(calls: dict[str, Callable[[int], None]], first: dict[str, float]) -> dict[str, float]:
    """Median seconds of interleaved rounds, each call with the copy used longest ago; a call without a rival is not
    timed again."""
    if len(calls) == 1:
        return {kind: first[kind] for kind in calls}
    rounds = int(max(FEWEST, min(MOST, BUDGET / sum(first[kind] for kind in calls))))
    names, times = list(calls), {kind: [] for kind in calls}
    for turn in range(rounds * len(names)):
        done, k = divmod(turn, len(names))
        kind = names[(k + done) % len(names)]
        times[kind].append(seconds(calls[kind], turn))
    return {kind: statistics.median(t) for kind, t in times.items()}

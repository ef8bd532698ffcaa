"""Correct kernels pass under every schedule, and the simulator finds every bug planted in them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

KERNELS = Path(__file__).parents[1] / "kernels"
MODES = [(schedule, completion) for schedule in (0, 1) for completion in (0, 1)]  # uniform/priority x random/latest
SEEDS = 6  # per mode


def bugs(name: str) -> list[str]:
    """The names in a kernel's list of bugs, the first of which is none."""
    names = re.search(r"enum Bug \{(.*?)\}", (KERNELS / name).read_text(), re.S)[1]
    return [n.strip() for n in names.split(",") if n.strip()]


def gemm(sim, name: str, bug: int, shape, seed: int, mode) -> bool:
    """Whether the product came out right; raises if the simulator saw something."""
    M, N, K = shape
    rng = np.random.default_rng(K)
    a, b = (rng.integers(-3, 4, s).astype(np.float32) for s in ((M, K), (N, K)))
    with sim.memory() as memory:
        args = [memory.put(torch.from_numpy(m).bfloat16().view(torch.int16).numpy(), alignment=16) for m in (a, b)]
        c = memory.empty((M, N), np.float32)
        sim.run(name, *args, M, N, K, c, bug, seed=seed, mode=mode)
        return np.array_equal(c.array, a @ b.T)


def last_arriver(sim, bug: int, seed: int, mode) -> bool:
    parts = np.random.default_rng(seed).integers(0, 99, (3, 64)).astype(np.float32)
    with sim.memory() as memory:
        between, counter, out = (
            memory.empty((3, 64), np.float32),
            memory.put(np.zeros(1, np.uint32)),
            memory.empty((2, 64), np.float32),
        )
        sim.run("sim_last_arriver", memory.put(parts), 3, between, counter, out, bug, seed=seed, mode=mode)
        return bool((out.array == parts.sum(0)).all())


def tickets(sim, bug: int, seed: int, mode) -> bool:
    parts = np.random.default_rng(seed).integers(0, 99, (4, 64)).astype(np.float32)
    with sim.memory() as memory:
        between, counters, out = (
            memory.empty((4, 64), np.float32),
            memory.put(np.zeros(2, np.uint32)),
            memory.empty((5, 64), np.float32),
        )
        sim.run("sim_tickets", memory.put(parts), 4, 5, between, counters, out, bug, seed=seed, mode=mode)
        return bool((out.array == parts.sum(0)).all())


def gemm_sm80(sim, bug: int, seed: int, mode) -> bool:
    return gemm(sim, "sim_gemm_sm80", bug, (33, 40, 136), seed, mode)


def gemm_sm90(sim, bug: int, seed: int, mode) -> bool:
    return gemm(sim, "sim_gemm_sm90", bug, (65, 40, 328), seed, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", [gemm_sm80, gemm_sm90, last_arriver, tickets])
def test_correct_kernels_pass(sim, kernel, mode):
    for seed in range(SEEDS):
        assert kernel(sim, 0, seed, mode), f"seed {seed}"


@pytest.mark.parametrize("shape", [(1, 1, 8), (32, 32, 32), (31, 33, 40), (64, 65, 8), (100, 7, 264)])
@pytest.mark.parametrize("name", ["sim_gemm_sm80", "sim_gemm_sm90"])
def test_ragged_products(sim, name, shape):
    for seed, mode in enumerate(MODES):
        assert gemm(sim, name, 0, shape, seed, mode)


def found_by(sim, kernel, bug: int, seeds: int) -> tuple[int, set[str]]:
    """How many of the runs show the bug, and what they say."""
    count, said = 0, set()
    for mode in MODES:
        for seed in range(seeds):
            try:
                wrong = not kernel(sim, bug, seed, mode)
                said |= {"wrong values"} if wrong else set()
            except Exception as fault:
                wrong = True
                said.add(re.sub(r"^block \d+,\d+ (thread \d+: )?", "", str(fault)))
            count += wrong
    return count, said


PLANTED = [
    *((gemm_sm80, i, n) for i, n in enumerate(bugs("gemm_sm80.cu"))),
    *((gemm_sm90, i, n) for i, n in enumerate(bugs("gemm_sm90.cu"))),
    *((last_arriver, i, n) for i, n in enumerate(bugs("publish.cu")) if n != "kNoTicket"),
    *((tickets, i, n) for i, n in enumerate(bugs("publish.cu")) if n in ("kNoFence", "kNoTicket")),
]


@pytest.mark.parametrize("kernel, bug, name", [pytest.param(*p, id=f"{p[0].__name__}-{p[2]}") for p in PLANTED if p[1]])
def test_planted_bug_is_found(sim, kernel, bug, name):
    seeds = SEEDS if kernel in (gemm_sm80, gemm_sm90) else 4 * SEEDS
    count, said = found_by(sim, kernel, bug, seeds)
    print(f"{kernel.__name__} {name}: {count} of {seeds * len(MODES)} runs, {sorted(said)[:3]}")
    assert count > 0

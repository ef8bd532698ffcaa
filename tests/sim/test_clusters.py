"""Clusters: exchange through each other's shared memory, multicast, dependent launches; and bugs planted in them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).with_name("kernels") / "clusters.cu"
MODES = [(schedule, completion) for schedule in (0, 1) for completion in (0, 1)]  # uniform/priority x random/latest


def bugs(name: str) -> list[str]:
    """The names in a list of bugs, the first of which is none."""
    return re.findall(r"\w+", re.search(rf"enum {name} \{{(.*?)\}}", SOURCE.read_text(), re.S)[1])


def exchange(sim, bug: int, seed: int, mode=(1, 0), size: int = 3, clusters: int = 2) -> bool:
    block, t, i = np.ogrid[: size * clusters, :64, :4]
    rank = block % size
    first = block - rank
    parts = [1000 * (first + (rank + r) % size) + 4 * (63 - t) + i for r in range(size)]
    stored = 7 * (first + (rank - 1) % size) + t + np.arange(7)
    expected = np.concatenate([*parts, np.broadcast_to(stored, (size * clusters, 64, 7))], 2)
    with sim.memory() as memory:
        out = memory.empty(expected.shape, np.uint32)
        sim.run("sim_exchange", size, clusters, out, bug, seed=seed, mode=mode)
        return np.array_equal(out.array, expected)


def push(sim, bug: int, seed: int, mode=(1, 0), size: int = 3, clusters: int = 2) -> bool:
    block, source, t, i = np.ogrid[: size * clusters, :size, :64, :7]
    expected = 10000 * (block // size * size + source) + 10 * t + i
    with sim.memory() as memory:
        out = memory.empty(expected.shape, np.uint32)
        sim.run("sim_push", size, clusters, out, bug, seed=seed, mode=mode)
        return np.array_equal(out.array, expected)


def multicast(sim, bug: int, seed: int, mode=(1, 0), steps: int = 5, clusters: int = 2) -> bool:
    data = np.random.default_rng(seed).integers(0, 1000, (16 * steps, 64)).astype(np.uint16)
    expected = data.sum(0, dtype=np.uint32) * np.tile([1, 2], clusters)[:, None]
    with sim.memory() as memory:
        out = memory.empty((2 * clusters, 64), np.uint32)
        sim.run("sim_multicast", memory.put(data, alignment=16), steps, clusters, out, bug, seed=seed, mode=mode)
        return np.array_equal(out.array, expected)


def handover(sim, bug: int, seed: int, mode=(1, 0), clusters: int = 2) -> bool:
    with sim.memory() as memory:
        out = memory.empty((2 * clusters, 32), np.uint32)
        sim.run("sim_cluster_handover", clusters, out, bug, seed=seed, mode=mode)
        return np.array_equal(out.array, 100 * (np.arange(2 * clusters)[:, None] ^ 1) + np.arange(32))


@pytest.mark.parametrize("mode", MODES)
def test_correct_kernels_pass(sim, mode):
    for seed in range(6):
        for size in (1, 2, 3, 8):
            assert exchange(sim, 0, seed, mode, size)
            assert push(sim, 0, seed, mode, size)
        for steps in (1, 2, 5):
            assert multicast(sim, 0, seed, mode, steps)
        assert handover(sim, 0, seed, mode)


SAID = {
    "kNoBarrierBeforeExit": "has exited",
    "kAddressOfThisBlock": "no cluster_address",
    "kOnlyArrives": "wrong values",
    "kPushTooManyBytes": "deadlock",
    "kPushNoWait": "in flight|wrong values",
    "kPushNoClusterBarrier": "has no mbarrier",
    "kPushBarrierOfThisBlock": "st.async to block",
    "kMaskOfOtherBlock": "deadlock|wrong values|in flight",
    "kNoRemoteArrival": "deadlock",
    "kBytesTooMany": "deadlock",
    "kNoClusterBarrierAfterInit": "no mbarrier was initialised",
    "kNoClusterBarrierAtEnd": "has exited|in flight",
    "kScopeOfBlock": "at the scope of the block",
}
PLANTED = [
    *((exchange, i, n) for i, n in enumerate(bugs("ExchangeBug")) if i),
    *((push, i, n) for i, n in enumerate(bugs("PushBug")) if i),
    *((multicast, i, n) for i, n in enumerate(bugs("MulticastBug")) if i),
    *((handover, i, n) for i, n in enumerate(bugs("HandoverBug")) if i),
]


@pytest.mark.parametrize("kernel, bug, name", [pytest.param(*p, id=p[2]) for p in PLANTED])
def test_planted_bug_is_found(sim, kernel, bug, name):
    count, said = 0, set()
    for mode in MODES:
        for seed in range(6):
            try:
                found = "" if kernel(sim, bug, seed, mode) else "wrong values"
            except Exception as fault:
                found = str(fault)
            count += bool(found)
            said |= {found} if found else set()
    print(f"{name}: {count} of {6 * len(MODES)} runs, {sorted(said)[:3]}")
    assert any(re.search(SAID.get(name, "."), text) for text in said), said


@pytest.mark.parametrize("waits", [True, False])
def test_dependent_launch(sim, waits):
    """What the launch before writes is there after the wait; without one it is missing or overwrites."""
    for seed in range(4):
        with sim.memory() as memory:
            values = np.arange(32, dtype=np.uint32)
            source, out = memory.put(values), memory.put(values * 0)
            sim.written_before(source)
            sim.written_before(out)
            sim.run("sim_dependent", source, out, int(waits), seed=seed, mode=(1, 1))
            np.testing.assert_array_equal(source.array, values)
            assert np.array_equal(out.array, values + (values > 0)) == waits

"""Clusters: exchange through each other's shared memory, multicast, dependent launches; and bugs planted in them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

KERNELS = Path(__file__).parents[1] / "kernels"
MODES = [(schedule, completion) for schedule in (0, 1) for completion in (0, 1)]  # uniform/priority x random/latest


def bugs(name: str) -> list[str]:
    """The names in a list of bugs, the first of which is none."""
    text = "".join((KERNELS / file).read_text() for file in ("clusters.cu", "dependent.cu"))
    return re.findall(r"\w+", re.search(rf"enum {name} \{{(.*?)\}}", text, re.S)[1])


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
        for size in (1, 2, 3, 8)[: 4 if seed < 2 else 3]:
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
    "kPushNoClusterBarrier": "has no mbarrier|no cluster barrier behind",
    "kPushNoInitFence": "no mbarrier_init_fence",
    "kPushInitFenceBeforeInit": "no mbarrier_init_fence",
    "kPushInitFenceBehindArrival": "no mbarrier_init_fence|no cluster barrier behind",
    "kMulticastNoInitFence": "no mbarrier_init_fence",
    "kHandoverNoInitFence": "no mbarrier_init_fence",
    "kPushBarrierOfThisBlock": "st.async to block",
    "kMaskOfOtherBlock": "deadlock|wrong values|in flight",
    "kNoRemoteArrival": "deadlock",
    "kBytesTooMany": "deadlock",
    "kNoClusterBarrierAfterInit": "has no mbarrier|no cluster barrier behind",
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


def dependent(sim, bug: int, seed: int, mode=(1, 0)) -> bool:
    start, constant = np.arange(32, dtype=np.uint32), np.arange(100, 132, dtype=np.uint32)
    with sim.memory() as memory:
        values = [memory.put(start), memory.put(constant)]
        # The tile's matrix begins where 16 bytes do.
        first, second, out = (memory.put(0 * start, alignment=16) for _ in range(3))
        sim.run("sim_dependent", *values, first, second, out, bug, seed=seed, mode=mode)
        made = 2 * start, 2 * start + 2 * constant, 2 * start + 4 * constant
        return all(np.array_equal(b.array, expected) for b, expected in zip((first, second, out), made, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_dependent_launches(sim, mode):
    assert all(dependent(sim, 0, seed, mode) for seed in range(3))


@pytest.mark.parametrize(
    "name, said",
    [
        ("kNoWait", "exits a dependent launch without grid_wait"),
        ("kOneThreadDoesNotWait", "exits a dependent launch without grid_wait"),
        ("kReadsBeforeWait", "which the launch before writes, before grid_wait"),
        ("kCopiesBeforeWait", "cp.async of what the launch before writes"),
        ("kLoadsTileBeforeWait", "tile_load of what the launch before writes"),
        ("kWritesBeforeWait", "a write before grid_wait"),
        ("kPublishesBeforeWait", "a store before grid_wait"),
        ("kCountsBeforeWait", "a write before grid_wait"),
        ("kReadsTheOneBeforeThat", "which the launch before writes, before grid_wait"),
    ],
)
def test_use_of_memory_before_the_wait_is_found(sim, name, said):
    """Under every schedule: whether it goes wrong is not left to chance."""
    for seed in range(2):
        for mode in MODES:
            with pytest.raises(Exception, match=said):
                dependent(sim, bugs("DependentBug").index(name), seed, mode)


def test_a_buffer_that_the_launch_before_writes(sim):
    """A test says so of a launch that the simulator does not run."""
    for said in ("a write before grid_wait", "which the launch before writes, before grid_wait"):
        with pytest.raises(Exception, match=said), sim.memory() as memory:
            source, out = memory.put(np.zeros(32, np.uint32)), memory.empty(32, np.uint32)
            if "launch before" in said:
                sim.written_before(source)
            sim.run("sim_double", source, out, 32, 1)

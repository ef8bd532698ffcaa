"""The golden vectors that GPUs are held to: the simulator computes them, every launcher has one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "gpu"))
import golden_cases
import native

EXPECTED = golden_cases.expected()


@pytest.mark.parametrize("case", golden_cases.CASES, ids=lambda c: c.name)
def test_the_simulator_computes_the_golden_vectors(sim, case):
    with sim.memory() as memory:
        results = case.run(golden_cases.SimulatorRunner(sim, memory, seed=11))
    golden = EXPECTED[case.name]
    assert len(results) == len(golden)
    for result, vector in zip(results, golden):
        assert golden_cases.same(result, vector), "python tests/gpu/golden_cases.py --write, if the change is meant"


def test_vectors_belong_to_cases():
    names = [case.name for case in golden_cases.CASES]
    assert len(set(names)) == len(names) and set(names) == set(EXPECTED)
    assert sum(file.stat().st_size for file in golden_cases.FOLDER.iterdir()) < 300_000
    for name, vectors in EXPECTED.items():
        assert vectors[-1].any(), name
        assert not any(vector.dtype.kind == "f" and (vector != vector).any() for vector in vectors), name


def test_a_changed_vector_is_noticed(sim):
    case = next(c for c in golden_cases.CASES if c.name == "mma-bf16")
    (golden,) = EXPECTED[case.name]
    assert golden_cases.same(golden, golden)
    changed = golden.copy()
    changed[3, 1] += 1
    assert not golden_cases.same(golden, changed)


def test_every_launcher_has_a_case():
    """A new instruction is compared with hardware: its launcher gets a case in tests/gpu/golden_cases.py."""
    exported = {name for source in native.KERNELS.glob("*.cu") for name in native.launchers(source)}
    assert exported == {case.launcher for case in golden_cases.CASES} | set(golden_cases.LEFT_OUT)
    hopper = {
        name
        for source in native.KERNELS.glob("*.cu")
        if native.needs_hopper(source)
        for name in native.launchers(source)
    }
    assert {case.launcher for case in golden_cases.CASES if case.arch == 90} <= hopper
    assert not {case.launcher for case in golden_cases.CASES if case.arch < 90} & hopper

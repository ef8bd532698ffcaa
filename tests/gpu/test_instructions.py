"""Each wrapped PTX instruction on hardware against the vectors that its host body computed."""

from __future__ import annotations

import golden_cases
import native
import numpy as np
import pytest
import torch

EXPECTED = golden_cases.expected()
BUILD = native.ROOT / "build/gpu"


def arch() -> int:
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


@pytest.fixture(scope="module")
def runner():
    """The launchers, built for this device."""
    if native.nvcc() is None:
        pytest.skip("nvcc is not installed, so there are no launchers for this device")
    return native.DeviceRunner(native.build(BUILD, arch()))


@pytest.mark.xdist_group("instructions")
@pytest.mark.parametrize("case", golden_cases.CASES, ids=lambda c: c.name)
def test_hardware_computes_the_golden_vectors(runner, case):
    if case.arch == 90 and arch() != 90:
        pytest.skip(f"an instruction of sm_90a, on sm_{arch()}")
    results, golden = case.run(runner), EXPECTED[case.name]
    assert len(results) == len(golden)
    for result, vector in zip(results, golden):
        assert golden_cases.same(result, vector), np.flatnonzero(result.reshape(-1) != vector.reshape(-1))[:20]


@pytest.mark.xdist_group("instructions")
@pytest.mark.parametrize("kind", [80, 90])
@pytest.mark.parametrize("M, N, K", [(1, 1, 8), (65, 72, 64), (130, 200, 328), (64, 64, 2048)])
def test_small_products(runner, kind, M, N, K):
    """Rings of copies and barriers at work: whole products of small integers, exact."""
    if kind == 90 and arch() != 90:
        pytest.skip(f"needs sm_90a, on sm_{arch()}")
    a, b = (golden_cases.numbers(shape, -4, 4, 50) for shape in ((M, K), (N, K)))
    out = runner.empty((M, N), np.float32)
    args = runner.put(golden_cases.halves(a, False)), runner.put(golden_cases.halves(b, False)), M, N, K, out, 0
    runner.launch(f"sim_gemm_sm{kind}", list(args))
    np.testing.assert_array_equal(runner.get(out), (a @ b.T).astype(np.float32))

"""bottleneck_adapter against fp64: every activation and option, in one kernel or three, ragged sizes; a row's bits are its own."""

from __future__ import annotations

import pytest
import torch

from peftkern.activations import ACTIVATIONS
from peftkern.kernels import configs
from peftkern.settings import using
from peftkern.testing.accuracy import check
from peftkern.testing.bottleneck_problems import OPTIONS, BottleneckProblem, random_bottleneck_problem

F16, F32 = torch.float16, torch.float32


def assert_accurate(problem, fused=None):
    fixed = () if fused is None else configs.fixed(bottleneck_fused=fused)
    with using(triton_fixed=fixed):
        bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_accuracy_of_random_problems(dtype, fused):
    for seed in range(8):
        assert_accurate(random_bottleneck_problem(300 + seed, dtype, max_M=96, max_KN=160, max_R=80), fused)

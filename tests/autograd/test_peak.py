"""The most memory that a step over a weight in codes takes at once: the resident memory of the process, so that scratch which
torch does not see counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peftkern import lora_linear
from peftkern.backends.cpu import call
from peftkern.bases.base import Base
from peftkern.benchmarks.core.case import Step
from peftkern.benchmarks.measure.memory import peak_bytes
from peftkern.testing.bases import dequantised, drawn

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

R, SCRATCH = 16, 64 << 20


def taken(base: Base, N: int, K: int, M: int, dtype: torch.dtype, linear=lora_linear) -> int:
    """Bytes that a step takes at once besides y, u and the gradients."""
    x, dy = torch.randn(M, K, dtype=dtype, requires_grad=True), torch.randn(M, N, dtype=dtype)
    A, B = torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)
    found = peak_bytes(Step(lambda i: linear(x, base, A, B), [(x, A, B)], [dy]))
    if found is None:
        pytest.skip("the peak of a process's memory cannot be reset here")
    return found - sum(t.nbytes for t in (x, dy, A, B)) - 4 * M * R


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """A step of a small layer, which loads what a first call loads."""
    taken(drawn("nf4", 64, 64, 0), 64, 64, 1, torch.float32)


@pytest.mark.parametrize("N, K", [(14336, 4096), (4096, 14336)])
def test_no_whole_weight(N, K):
    base = drawn("nf4", N, K, 0)
    for M in (16, 512):
        for dtype in (torch.float32, torch.bfloat16):
            found = taken(base, N, K, M, dtype)
            assert found <= SCRATCH < N * K * dtype.itemsize, f"{M} rows, {dtype}: {found / 1e6:.0f} MB"


def test_a_whole_weight_is_seen():
    def linear(x, base, A, B):
        return F.linear(x, dequantised(base, N, K)) + F.linear(F.linear(x, A), B)

    N, K = 4096, 5120
    assert taken(drawn("nf4", N, K, 0), N, K, 16, torch.float32, linear) > N * K * 4 > SCRATCH

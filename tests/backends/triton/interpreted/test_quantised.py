"""Weights in codes: the loader against each kind's definition, then every product that reads one."""

from __future__ import annotations

import pytest
import torch

from peftkern.backends.triton.operand import KINDS, weight_of
from peftkern.bases.base import QUANTISED as ALL
from peftkern.bases.base import kind_of
from peftkern.kernels import configs
from peftkern.kernels.panels import times
from peftkern.settings import using
from peftkern.testing.accuracy import check
from peftkern.testing.bases import QUANTISED, random_base
from peftkern.testing.norm_problems import RowNormProblem
from peftkern.testing.problems import LoRALinearProblem

F16, F32 = torch.float16, torch.float32
READ = [name for name in QUANTISED if name.split()[0] in KINDS]
# A kind of each way to hold codes and scales.
WAYS = ("nf4", "fp4 nested", "int8", "int4", "fp8 by blocks", "mxfp4", "q4_0", "q8_0")


def sizes(name: str, N: int, K: int) -> tuple[int, int]:
    """N and K as odd as the kind allows."""
    return N, max(QUANTISED[name][1], K - K % QUANTISED[name][1])


def assert_accurate(problem):
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("shape", [(7, 45), (67, 165), (130, 192)], ids=str)
def test_panels_are_the_definition(name, shape, monkeypatch):
    """A product with the unit matrix, by panels of either side of W, and more than one of them: W to the bit."""
    N, K = sizes(name, *shape)
    base = random_base(name, N, K, torch.Generator().manual_seed(N + K))
    W = kind_of(base.kind).dequantise(base.tensors, F32, (N, K))
    weight = weight_of(*base, N, K)
    monkeypatch.setattr(configs, "panel_columns", lambda C, itemsize: 128)
    assert torch.equal(times(torch.eye(N), weight.t(), 0), W)
    assert torch.equal(times(torch.eye(K), weight, 0), W.t())
    assert torch.equal(times(torch.eye(K, dtype=F16), weight, 0), W.half().t())

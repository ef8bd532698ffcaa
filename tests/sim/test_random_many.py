"""Random layers with many adapters through the public function, computed by the CUDA back end in the simulator.

Judged as every back end is (peftkern/testing/accuracy.py): by the error that eager PyTorch makes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peftkern import settings
from peftkern.autograd import multi_lora_linear as public
from peftkern.backends.cuda import OPS
from peftkern.ops.multi_lora_linear import MultiForward
from peftkern.testing.accuracy import check
from peftkern.testing.multi_problems import random_multi_problem


def problems(dtype: torch.dtype, count: int):
    """Those with vectors, without dropout; the output alone."""
    found, seed = [], 0
    while len(found) < count:
        p = random_multi_problem(seed, dtype, max_M=60, max_KN=200, max_R=40, max_adapters=6)
        if p.vectors and not p.branch and not any(p.dropout_p):
            found.append(replace(p, frozen=frozenset(p.tensors())))
        seed += 1
    return found


@pytest.mark.parametrize("device", [90], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("number", range(8))
def test_random_problem(device, dtype, number, monkeypatch):
    monkeypatch.setattr(public, "_fwd", lambda *args: OPS["multi_lora_linear_fwd"](MultiForward(*args)))
    problem = problems(dtype, 8)[number]
    with settings.using(backend="reference"):
        bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}: {bad}"

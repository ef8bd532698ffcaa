"""Random layers with many adapters through the public function, computed by the CUDA back end in the simulator.

Judged as every back end is (peftkern/testing/accuracy.py): by the error that eager PyTorch makes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.backends.cuda import OPS
from peftkern.ops.multi_lora_linear import MultiForward
from peftkern.testing.accuracy import check
from peftkern.testing.multi_problems import random_multi_problem

COUNT = 8


class Cuda(TorchDispatchMode):
    """The CUDA back end computes forward passes."""

    taken = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is not torch.ops.peftkern.multi_lora_linear_fwd.default:
            return op(*args, **(kwargs or {}))
        self.taken += 1
        return OPS["multi_lora_linear_fwd"](MultiForward(*args))


def problems(dtype: torch.dtype):
    """Those with vectors, without dropout; the output alone."""
    found, seed = [], 0
    while len(found) < COUNT:
        p = random_multi_problem(seed, dtype, max_M=60, max_KN=200, max_R=40, max_adapters=6, bottlenecks=False)
        if p.vectors and not p.branch and not any(p.dropout_p):
            found.append(replace(p, frozen=frozenset(p.tensors())))
        seed += 1
    return found


@pytest.mark.parametrize("device", [90], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("number", range(COUNT))
def test_random_problem(device, dtype, number):
    problem = problems(dtype)[number]
    with Cuda() as mode:
        bad = [row for row in check(problem) if not row.ok]
    assert mode.taken and not bad, f"{problem}: {bad}"

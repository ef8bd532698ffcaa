"""Every provider computes the same function: a benchmark that compares different things is worthless."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from peftkern.benchmarks.core.case import BASE, FP32_BASE, Case
from peftkern.benchmarks.ops import lora_linear
from peftkern.benchmarks.peers.addmm import addmm_lora

CASE = Case("lora_linear", "cpu", torch.float32, torch.float32, 9, 20, 12, 4, 0.0)
# Those that force a back end are tested in test_candidates.py.
NAMES = [
    n for n, p in lora_linear.PROVIDERS.items()
    if n not in (BASE, FP32_BASE, "peft_compile") and p.around is contextlib.nullcontext
]  # fmt: skip


def _outcome(name, case):
    data = lora_linear.make_data(case, 1)
    step = lora_linear.PROVIDERS[name].build(case, data)
    y = step.forward(0)
    return [y.detach(), *torch.autograd.grad(y, step.leaves[0], step.dy[0])]


def _exact(case):
    data = lora_linear.make_data(case, 1)
    A, B = data.adapters(case.R, case.adapter_dtype)
    x, w, a, b = (t.detach().double().requires_grad_() for t in (data.x[0], data.weight[0], A, B))
    y = x @ w.T + lora_linear.SCALING * (x @ a.T) @ b.T
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), data.dy[0].double())]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype, adapter, tol", [
    (torch.float32, torch.float32, 1e-5),
    (torch.bfloat16, torch.float32, 3e-2),
    (torch.bfloat16, torch.bfloat16, 3e-2),
])  # fmt: skip
def test_same_numbers(name, dtype, adapter, tol):
    if name == "peft":
        pytest.importorskip("peft")
    case = dataclasses.replace(CASE, dtype=dtype, adapter_dtype=adapter)
    for mine, exact, want in zip(_outcome(name, case), _exact(case), (dtype, dtype, adapter, adapter)):
        assert mine.dtype == want
        assert (mine.double() - exact).norm() <= tol * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_dropout_acts(name):
    if name == "peft":
        pytest.importorskip("peft")
    plain, dropped = _outcome(name, CASE), _outcome(name, dataclasses.replace(CASE, dropout=0.5))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain[:3], dropped[:3]))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_addmm_gradients(dropout_p):
    made = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 7), (3, 7), (6, 3))]
    w = torch.randn(6, 7, dtype=torch.float64)

    def call(x, a, b):
        torch.manual_seed(3)
        return addmm_lora(x, w, a, b, 0.7, dropout_p)

    assert torch.autograd.gradcheck(call, made)


def test_copies_exceed_the_cache_only_for_few_rows():
    few = dataclasses.replace(CASE, M=1, K=4096, N=4096, dtype=torch.bfloat16)
    assert lora_linear.copies(few, 32 << 20) == 2
    assert lora_linear.copies(few, 512 << 20) == 8
    assert lora_linear.copies(dataclasses.replace(few, M=512), 512 << 20) == 1
    assert lora_linear.copies(dataclasses.replace(few, K=64), 32 << 20) == 1


def test_data_is_the_same_every_time():
    a, b = (lora_linear.make_data(CASE, 2) for _ in range(2))
    assert torch.equal(a.x[1], b.x[1]) and not torch.equal(a.x[0], a.x[1])
    assert torch.equal(a.adapters(4, torch.float32)[1], b.adapters(4, torch.float32)[1])


@pytest.mark.slow(10)
def test_compiled_peft():
    pytest.importorskip("peft")
    case = dataclasses.replace(CASE, M=8, K=16, N=16)
    for mine, exact in zip(_outcome("peft_compile", case), _exact(case)):
        assert (mine.double() - exact).norm() <= 1e-5 * exact.norm()

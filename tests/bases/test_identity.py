"""The identity as a base: y = g_b * (x * p_b) + branch, and all its gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from peftkern import lora_linear
from peftkern.backends import triton
from peftkern.bases.base import IDENTITY
from peftkern.dispatch.choose import load
from peftkern.problem import Problem
from peftkern.settings import current
from peftkern.testing.accuracy import check
from peftkern.testing.arguments import backward, forward
from peftkern.testing.problems import LoRALinearProblem, random_problem, vectors

CPU_REASON = load("cpu").unavailable(current())
NO_CPU = pytest.mark.skipif(CPU_REASON is not None, reason=f"no native build: {CPU_REASON}")
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["reference", pytest.param("cpu", marks=NO_CPU)])
def backend(request, monkeypatch):
    monkeypatch.setenv("PEFTKERN_BACKEND", request.param)
    return request.param


def assert_accurate(problem):
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_random_problems(backend, dtype):
    for seed in range(12):
        problem = random_problem(4000 + seed, dtype, max_M=300, max_KN=700, max_R=80)
        assert_accurate(dataclasses.replace(problem, base="identity", N=problem.K))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_every_vector_and_dropout(backend, dtype):
    assert_accurate(LoRALinearProblem(
        5, 37, 141, 141, 11, dtype, torch.float32, scaling=0.7, dropout_p=0.4, options=tuple(vectors()), base="identity",
    ))  # fmt: skip


def layer(dtype=torch.float64, grad=True, K=7, R=3):
    g = torch.Generator().manual_seed(0)
    sizes = dict(x=(4, K), lora_A=(R, K), lora_B=(K, R))
    return {k: torch.randn(*s, generator=g).to(dtype).requires_grad_(grad) for k, s in sizes.items()}


def test_gradcheck():
    t = layer()
    assert torch.autograd.gradcheck(
        lambda x, A, B: lora_linear(x, IDENTITY, A, B, scaling=0.5, dropout_p=0.3, training=True, seed=3),
        tuple(t.values()),
    )


@pytest.mark.parametrize("empty", ["M", "K", "R"])
def test_empty_sizes(backend, empty):
    M, K, R = (0 if name == empty else size for name, size in dict(M=4, K=5, R=2).items())
    x, A, B = (torch.randn(*s, requires_grad=True) for s in ((M, K), (R, K), (K, R)))
    y = lora_linear(x, IDENTITY, A, B)
    assert y.shape == (M, K)
    y.sum().backward()
    if empty == "R":
        assert torch.equal(y, x) and torch.equal(x.grad, torch.ones_like(x))


def test_the_output_is_no_view_of_x(backend):
    x, A, B = (t.detach() for t in layer(torch.float32).values())
    y = lora_linear(x, IDENTITY, A, torch.zeros_like(B))
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
    _, _, h = torch.ops.peftkern.lora_linear_fwd(*forward(x, IDENTITY, A, B, save_base=True))
    assert torch.equal(h, x) and h.data_ptr() != x.data_ptr()


def test_opcheck_compile_and_trace(backend):
    t = layer(torch.float32)
    x, A, B = t.values()
    plain = [v.detach() for v in t.values()]
    torch.library.opcheck(torch.ops.peftkern.lora_linear_fwd, forward(plain[0], IDENTITY, *plain[1:]))
    u = torch.randn(4, 3)
    torch.library.opcheck(
        torch.ops.peftkern.lora_linear_bwd, backward(torch.randn(4, 7), plain[0], u, None, IDENTITY, *plain[1:])
    )

    def call(x):
        return lora_linear(x, IDENTITY, A, B, scaling=2.0)

    expected = torch.autograd.grad(call(x).square().sum(), [x, A, B])
    for dynamic in (False, True):
        compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        torch.testing.assert_close(compiled(x), call(x))
        torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), [x, A, B]), expected)
    trace = torch.jit.trace(lambda x: lora_linear(x, IDENTITY, *plain[1:], scaling=2.0), plain[0])
    torch.testing.assert_close(trace(plain[0] + 1), call(plain[0] + 1).detach())


def test_autocast(backend):
    x, A, B = layer(torch.float32).values()
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, IDENTITY, A, B)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, lora_linear(x.bfloat16(), IDENTITY, A, B))
    y.float().sum().backward()
    assert x.grad.dtype == A.grad.dtype == torch.float32


def test_flops_are_those_of_the_branch():
    from torch.utils.flop_counter import FlopCounterMode

    x, A, B = layer(torch.float32).values()
    with FlopCounterMode(display=False) as counter:
        lora_linear(x, IDENTITY, A, B)
    assert counter.get_total_flops() == 2 * 4 * 3 * (7 + 7)


@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_bwd"])
def test_triton_takes_it(op, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    problem = Problem(op, "cpu", "", torch.float32, torch.float32, 4, 5, 5, 2, frozenset({"identity"}))
    assert triton.decline(problem, current()) is None

"""The public functions on quantised weights: as on the dequantised one."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from peftkern import Adapter, AdapterBank, dora_linear, lora_linear, multi_lora_linear, quantize
from peftkern.autograd.row_norm import row_norm
from peftkern.bases.base import kind_of
from peftkern.testing.accuracy import check
from peftkern.testing.arguments import backward, forward
from peftkern.testing.bases import QUANTISED, dequantised, drawn
from peftkern.testing.multi_problems import random_multi_problem
from peftkern.testing.norm_problems import random_norm_problem
from peftkern.testing.problems import LoRALinearProblem, random_problem, vectors

HALF = (torch.bfloat16, torch.float16)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
KINDS = pytest.mark.parametrize("name", QUANTISED)


@pytest.fixture(params=["reference", "auto"])
def backend(request, monkeypatch):
    monkeypatch.setenv("PEFTKERN_BACKEND", request.param)
    return request.param


def assert_accurate(problem):
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


def on(problem, name):
    """The problem on a base of that name, with the nearest K that its kind has."""
    step = QUANTISED[name][1]
    return dataclasses.replace(problem, base=name, K=-(-problem.K // step) * step)


@DTYPES
@KINDS
def test_random_problems(backend, name, dtype):
    for seed in range(3):
        assert_accurate(on(random_problem(7000 + seed, dtype, max_M=120, max_KN=300, max_R=40), name))


@DTYPES
@KINDS
def test_every_vector_and_dropout(backend, name, dtype):
    problem = LoRALinearProblem(
        5, 19, 96, 139, 5, dtype, torch.float32, scaling=0.7, dropout_p=0.4, options=tuple(vectors())
    )
    assert_accurate(on(problem, name))


@DTYPES
@KINDS
def test_many_adapters(backend, name, dtype):
    for seed in range(2):
        problem = random_multi_problem(7100 + seed, dtype, max_M=80, max_KN=200, max_R=20, max_adapters=4)
        assert_accurate(on(dataclasses.replace(problem, branch=False), name))


@DTYPES
@KINDS
def test_row_norms(backend, name, dtype):
    for seed in range(3):
        problem = random_norm_problem(7200 + seed, dtype, max_KN=300, max_R=30)
        # Without a weight's dtype the adapters' says that of the sums: both give fp32.
        assert_accurate(on(problem, name))


def layer(name, dtype=torch.float32, N=10, K=96, R=3):
    g = torch.Generator().manual_seed(1)
    x, A, B = (torch.randn(*s, generator=g).to(dtype).requires_grad_() for s in ((4, K), (R, K), (N, R)))
    base = drawn(name, N, K, 2)
    return x, base, A, B, dequantised(base, N, K).to(dtype)


@KINDS
def test_fp64(name):
    x, base, A, B, W = layer(name, torch.float64)
    dy = torch.randn(4, 10, dtype=torch.float64)
    options = dict(scaling=0.5, dropout_p=0.3, training=True, seed=3)
    ours, theirs = lora_linear(x, base, A, B, **options), lora_linear(x, W, A, B, **options)
    assert torch.equal(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, (x, A, B), dy), torch.autograd.grad(theirs, (x, A, B), dy), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(row_norm(base, A, B, 0.5), row_norm(W, A, B, 0.5))
    ids = torch.tensor([0, -1, 1, 0])
    adapters = [(A, B, 0.5), (A[:2], B[:, :2], 2.0)]
    assert torch.equal(multi_lora_linear(x, base, adapters, ids), multi_lora_linear(x, W, adapters, ids))


def test_gradcheck():
    x, base, A, B, _ = layer("nf4 nested", torch.float64)
    assert torch.autograd.gradcheck(lambda *t: lora_linear(t[0], base, *t[1:], scaling=0.5), (x, A, B))


@pytest.mark.parametrize("name", ["nf4", "nf4 nested", "int8 bf16", "hqq4"])
def test_opcheck_compile_and_trace(name):
    x, base, A, B, W = layer(name)
    plain = [t.detach() for t in (x, A, B)]
    torch.library.opcheck(torch.ops.peftkern.lora_linear_fwd, forward(plain[0], base, *plain[1:]))
    dy, u = torch.randn(4, 10), torch.randn(4, 3)
    torch.library.opcheck(torch.ops.peftkern.lora_linear_bwd, backward(dy, plain[0], u, None, base, *plain[1:]))

    def call(x):
        return lora_linear(x, base, A, B, scaling=2.0).square().sum() + row_norm(base, A, B).sum()

    expected = torch.autograd.grad(call(x), [x, A, B])
    for dynamic in (False, True):
        compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(x), [x, A, B]), expected)
    trace = torch.jit.trace(lambda x: lora_linear(x, base, *plain[1:], scaling=2.0), plain[0])
    torch.testing.assert_close(trace(plain[0] + 1), lora_linear(plain[0] + 1, W, *plain[1:], scaling=2.0))


def test_many_adapters_compiled():
    x, base, A, B, _ = layer("nf4")
    ids = torch.tensor([0, -1, 0, 0])

    def call(x):
        return multi_lora_linear(x, base, [(A, B, 0.5)], ids)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))


@pytest.mark.parametrize("name", ["nf4", "int4", "fp8 by blocks"])
def test_autocast_leaves_codes_alone(backend, name):
    x, base, A, B, _ = layer(name)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, base, A, B)
    assert y.dtype == torch.bfloat16 and torch.equal(y, lora_linear(x.bfloat16(), base, A, B))
    y.float().sum().backward()
    assert x.grad.dtype == A.grad.dtype == torch.float32


def test_what_is_saved_is_the_base_itself():
    x, base, A, B, _ = layer("nf4")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, base, A, B)
    assert {t.data_ptr() for t in base.tensors} <= {t.data_ptr() for t in saved}
    assert sum(t.nbytes for t in saved) < 3 * (x.nbytes + A.nbytes + B.nbytes)


def test_adapters_without_matrices_take_sizes_from_the_base():
    x, base, _, _, W = layer("nf4")
    bank = AdapterBank(96, 10, max_adapters=2, max_rank=4)
    ids = torch.full((4,), -1)
    torch.testing.assert_close(multi_lora_linear(x, base, bank, ids), x @ W.t())


def test_made_without_a_library():
    W = torch.randn(10, 96)
    for kind in ("nf4", "fp4", "int8", "fp8", "mxfp4"):
        base = quantize(W, kind)
        x, _, A, B, _ = layer("nf4")
        approximate = kind_of(kind).dequantise(base.tensors, torch.float32, (10, 96))
        torch.testing.assert_close(lora_linear(x, base, A, B), x @ approximate.t() + x @ A.t() @ B.t())


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "int4", "hqq4", "quanto4", "q4_0", "q8_0"])
def test_a_base_of_another_shape_is_refused(kind):
    """One with as many elements: the tensors of some kinds fit any shape."""
    K, N = 64, 128
    base, A, B = drawn(kind, K, N, 0)._replace(shape=(K, N)), torch.randn(4, K), torch.randn(N, 4)
    x, none = torch.randn(3, K), Adapter()
    calls = {
        "lora_B and x": lambda: lora_linear(x, base, A, B),
        "adapters and x": lambda: multi_lora_linear(x, base, [(A, B, 1.0)], torch.zeros(3, dtype=torch.int64)),
        "lora_B and lora_A": lambda: row_norm(base, A, B),
    }
    for by, call in calls.items():
        with pytest.raises(ValueError, match=re.escape(f"shape (64, 128), but {by} are for (N, K) = (128, 64)")):
            call()
    with pytest.raises(ValueError, match=r"(codes|weight) .*shape"):
        multi_lora_linear(x, base, [none], torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="lora_A has shape"):
        dora_linear(x, base, A, B, torch.ones(N))
    assert lora_linear(torch.randn(3, N), base, torch.randn(4, N), torch.randn(K, 4)).shape == (3, K)


@KINDS
@pytest.mark.parametrize("N, K", [(8, 0), (0, 64)])
def test_a_base_without_elements(backend, name, N, K):
    base = drawn(name, N, K, 0)
    x, bias = torch.ones(2, K, requires_grad=True), torch.arange(float(N))
    A, B = torch.zeros(2, K), torch.zeros(N, 2)
    for y in (
        lora_linear(x, base, A, B, bias=bias),
        multi_lora_linear(x, base, [(A, B, 1.0)], torch.zeros(2, dtype=torch.int64), bias=bias),
    ):
        assert torch.equal(y, bias.expand(2, N))
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx, torch.zeros(2, K))
    assert torch.equal(row_norm(base, A, B), torch.zeros(N))

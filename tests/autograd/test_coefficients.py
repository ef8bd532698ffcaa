"""A coefficient that nobody has heard of: one more row of the equation, and it is checked, trained and verified."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from peftkern import dropout_mask, equation, lora_linear
from peftkern.autograd.lora_linear import Options, lora_linear_with
from peftkern.dispatch.choose import load
from peftkern.settings import current
from peftkern.testing.accuracy import check
from peftkern.testing.problems import LoRALinearProblem, random_problem, vectors

CPU_REASON = load("cpu").unavailable(current())
NO_CPU = pytest.mark.skipif(CPU_REASON is not None, reason=f"no native build: {CPU_REASON}")
M, K, N, R = 7, 11, 9, 3


@pytest.fixture(params=["reference", pytest.param("cpu", marks=NO_CPU)])
def backend(request, monkeypatch):
    monkeypatch.setenv("PEFTKERN_BACKEND", request.param)
    return request.param


@pytest.fixture(params=[at.symbol for at in equation.PLACES])
def row(request, monkeypatch):
    """A new row at each place in turn."""
    added = equation.Coefficient("other_scale", request.param)
    monkeypatch.setattr(equation, "COEFFICIENTS", (*equation.COEFFICIENTS, added))
    return added


@pytest.fixture
def size(row):
    return dict(K=K, N=N, R=R)[equation.place(row.symbol).axis]


def leaves(*names, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    axes, sizes = vectors(), dict(K=K, N=N, R=R)
    shapes = dict(x=(M, K), lora_A=(R, K), lora_B=(N, R)) | {name: (sizes[axes[name]],) for name in names}
    made = {name: torch.randn(*shape, generator=g).to(dtype).requires_grad_() for name, shape in shapes.items()}
    return made, torch.randn(N, K, generator=g).to(dtype)


def call(t, weight, **options):
    t = dict(t)
    x, lora_A, lora_B = (t.pop(name) for name in ("x", "lora_A", "lora_B"))
    return lora_linear_with(x, weight, lora_A, lora_B, None, Options(**options), t)


def test_problems_of_the_verifier_have_it(row, backend):
    """Output and every gradient, of problems with it beside other vectors, dropout and odd layouts."""
    assert vectors()["other_scale"] == equation.place(row.symbol).axis
    seen = []
    for seed in range(8):
        problem = random_problem(6000 + seed, torch.float32, max_M=60, max_KN=90, max_R=20)
        seen.append("other_scale" in problem.options)
        bad = [r for r in check(problem) if not r.ok]
        assert not bad, f"{problem}\n" + "\n".join(f"{r.ratio:.2f} {r}" for r in bad)
    assert True in seen and False in seen
    for dtype in (torch.float32, torch.bfloat16):
        every = LoRALinearProblem(
            3, 33, 40, 41, 6, dtype, torch.float32, scaling=1.5, dropout_p=0.2, options=tuple(vectors()),
        )  # fmt: skip
        for problem in (every, dataclasses.replace(every, base="identity", N=40)):
            rows = check(problem)
            assert {"dother_scale", *(f"d{c.name}" for c in equation.COEFFICIENTS)} < {r.output for r in rows}
            # Two factors of one place are rounded where they meet, once each: PEFT's order would round as often.
            bad = [r for r in rows if not r.ok]
            assert not bad, f"{problem}\n" + "\n".join(f"{r.ratio:.2f} {r}" for r in bad)


def test_alone_it_is_the_coefficient_of_its_place(row, size, backend):
    known = next(c.name for c in equation.COEFFICIENTS if c.symbol == row.symbol)
    t, weight = leaves("other_scale")
    renamed = {known if name == "other_scale" else name: value for name, value in t.items()}
    results = []
    for given in (t, renamed):
        y = call(given, weight, scaling=0.5, dropout_p=0.25, seed=4)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(given.values()))])
    assert all(map(torch.equal, *results))
    x, lora_A, lora_B, vector = renamed.values()
    options = dict(scaling=0.5, dropout_p=0.25, training=True, seed=4)
    assert torch.equal(results[0][0], lora_linear(x, weight, lora_A, lora_B, **options, **{known: vector}))


def test_gradcheck_beside_the_other_of_its_place(row):
    known = next(c.name for c in equation.COEFFICIENTS if c.symbol == row.symbol)
    t, weight = leaves(known, "other_scale", dtype=torch.float64)
    names = list(t)

    def function(*values):
        return call(dict(zip(names, values, strict=True)), weight, scaling=0.7, dropout_p=0.3, seed=5)

    assert torch.autograd.gradcheck(function, tuple(t.values()))


def test_what_does_not_fit_is_named(row, size):
    t, weight = leaves()
    known = next(c.name for c in equation.COEFFICIENTS if c.symbol == row.symbol)
    plain = {name: value.detach() for name, value in t.items()}
    bad = {
        "a size": (torch.ones(size + 1), ValueError),
        "one element": (torch.ones(1), ValueError),
        "two dimensions": (torch.ones(1, size), ValueError),
        "a dtype": (torch.ones(size, dtype=torch.int64), TypeError),
        "half": (torch.ones(size, dtype=torch.float16), TypeError),
        "a device": (torch.ones(size, device="meta"), ValueError),
        "a number": (1.0, TypeError),
    }
    for what, (value, error) in bad.items():
        with pytest.raises(error, match="other_scale"):
            call(plain | {"other_scale": value}, weight)
        if what != "half":  # which a product takes
            with pytest.raises(error, match="other_scale"):
                call(plain | {known: torch.ones(size), "other_scale": value}, weight)


def test_without_the_row_it_is_unknown():
    t, weight = leaves()
    with pytest.raises(TypeError, match="other_scale is no coefficient"):
        call(t | {"other_scale": torch.ones(R)}, weight)


def test_it_compiles_and_runs_under_autocast(row, backend):
    t, weight = leaves("other_scale")
    expected = torch.autograd.grad(call(t, weight, scaling=1.5).square().sum(), list(t.values()))
    compiled = torch.compile(lambda t: call(t, weight, scaling=1.5), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(t).square().sum(), list(t.values())), expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(t, weight, scaling=1.5)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and t["other_scale"].grad.dtype == torch.float32


def test_dropped_elements_stay_dropped(row, backend):
    t, weight = leaves("other_scale")
    keep = dropout_mask(M, K, 0.5, 9)
    weight = torch.zeros_like(weight)
    poisoned = t | {"x": t["x"].detach().masked_fill(~keep, 1e30)}
    one = call(poisoned, weight, dropout_p=0.5, seed=9)
    torch.testing.assert_close(one, call(t, weight, dropout_p=0.5, seed=9))

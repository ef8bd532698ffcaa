"""Maps of few numbers added to y in place: Kronecker products and circular correlations, against their matrices in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import linear

from peftkern.autograd.maps import added, kron
from peftkern.autograd.maps.circulant import add_circulant
from peftkern.autograd.maps.kron import Kron, add_kron

SCALING = 0.7


def _kron(x, w1, w2, b=None):
    return linear(x, torch.kron(w1, w2 if b is None else w2 @ b))


def _add_kron(y, x, w1, w2, b=None):
    return add_kron(y, x, w1, w2 if b is None else (w2, b), SCALING)


def _circulant(x, w):
    b = w.shape[2]
    places = (torch.arange(b) - torch.arange(b)[:, None]) % b  # [t, k]
    return linear(x, w[:, :, places].permute(0, 2, 1, 3).reshape(w.shape[0] * b, -1))


def _add_circulant(y, x, w):
    return add_circulant(y, x, w, SCALING)


# (the map, its equation, K, shapes of the factors)
CASES = {
    "right first": (_add_kron, _kron, 15, [(4, 3), (2, 5)]),
    "left first": (_add_kron, _kron, 15, [(1, 3), (7, 5)]),
    "low rank": (_add_kron, _kron, 18, [(8, 2), (4, 2), (2, 9)]),
    "low rank, left first": (_add_kron, _kron, 21, [(1, 3), (9, 2), (2, 7)]),
    "a rank that is no less": (_add_kron, _kron, 6, [(2, 3), (3, 2), (2, 2)]),
    "columns": (_add_kron, _kron, 1, [(3, 1), (2, 1)]),
    "even blocks": (_add_circulant, _circulant, 12, [(2, 3, 4)]),
    "odd blocks": (_add_circulant, _circulant, 10, [(3, 2, 5)]),
    "blocks of one": (_add_circulant, _circulant, 3, [(2, 3, 1)]),
}


@pytest.fixture(params=[0, 2**20], ids=["by parts", "small ones at once"], autouse=True)
def small(request, monkeypatch):
    """Multiplications up to which Kronecker products are whole matrices."""
    monkeypatch.setattr(kron, "SMALL", request.param)
    return request.param


def _make(case, rows=(3, 4), dtype=torch.float64):
    add, equation, K, shapes = CASES[case]
    x, *factors = (torch.randn(s, dtype=dtype).requires_grad_() for s in ((*rows, K), *shapes))
    y = torch.randn_like(equation(x, *factors)).requires_grad_()
    return add, equation, y, x, factors


def _grads(y, inputs, dy):
    return torch.autograd.grad(y, inputs, dy)


def test_cases_take_both_orders():
    orders = {case: Kron(*map(torch.empty, c[3])).starts_right for case, c in CASES.items() if c[0] is _add_kron}
    assert orders["right first"] and not orders["left first"] and orders["low rank"]
    assert not orders["low rank, left first"]


@pytest.mark.parametrize("scratch", [2**18, 20])
@pytest.mark.parametrize("rows", [(3, 4), (13,), (2, 0)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equation_and_gradients(case, rows, scratch, monkeypatch):
    monkeypatch.setattr(added, "SCRATCH", scratch)  # a small one has many parts
    add, equation, y, x, factors = _make(case, rows)
    inputs, dy = [y, x, *factors], torch.randn_like(y)
    into = y.clone()
    got, want = add(into, x, *factors), y + SCALING * equation(x, *factors)
    assert got.data_ptr() == into.data_ptr(), "in place"
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for g, w in zip(_grads(got, inputs, dy), _grads(want, inputs, dy), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    add, _, y, x, factors = _make(case)
    assert torch.autograd.gradcheck(lambda y, *t: add(y.clone(), *t), (y, x, *factors))


@pytest.mark.parametrize("case", CASES)
def test_any_gradients_may_be_needed(case):
    add, equation, y, x, factors = _make(case)
    inputs, dy = [y, x, *factors], torch.randn_like(y)
    every = _grads(y + SCALING * equation(x, *factors), inputs, dy)
    for needs in itertools.product((False, True), repeat=len(inputs)):
        if not any(needs):
            continue
        some = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs)]
        got = add(some[0].clone(), *some[1:])
        wanted = [t for t in some if t.requires_grad]
        for g, w in zip(_grads(got, wanted, dy), [e for e, need in zip(every, needs) if need], strict=True):
            torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_rounded_once(case, dtype, autocast):
    # Factors in fp32, x in half precision or made so by autocast, at the call alone.
    add, equation, y, x, factors = _make(case, (40,), torch.float32)
    given = x.detach() if autocast else x.detach().to(dtype)
    given.requires_grad_()
    into = y.detach().to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        got = add(into.clone(), given, *factors)
    exact_x, *exact = (t.detach().double().requires_grad_() for t in (given.detach().to(dtype), *factors))
    want = into.double() + SCALING * equation(exact_x, *exact)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (got.double() - want).abs().max() <= 0.51 * eps * want.abs().max()
    dy = torch.randn_like(got)
    dx, *found = _grads(got, [given, *factors], dy)
    want_x, *wanted = _grads(want, [exact_x, *exact], dy.double())
    assert (dx.double() - want_x).norm() <= (2e-6 if autocast else 0.51 * eps) * want_x.norm()
    for g, w in zip(found, wanted, strict=True):
        assert g.dtype == torch.float32 and (g.double() - w).norm() <= 2e-6 * w.norm()


def test_strided_input_and_factors():
    add, equation, K, shapes = CASES["low rank"]
    x, *factors = (torch.randn(*s[:-1], 2 * s[-1], dtype=torch.float64)[..., ::2] for s in ((6, K), *shapes))
    y = torch.zeros(6, 32, dtype=torch.float64)
    torch.testing.assert_close(add(y, x, *factors), SCALING * equation(x, *factors))


def test_the_input_alone_is_kept():
    for case, (add, _, K, shapes) in CASES.items():
        x, *factors = (torch.randn(s).requires_grad_() for s in ((4096, K), *shapes))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = add(torch.zeros(4096, _width(case)), x, *factors)
        large = [t for t in kept if t.numel() >= 4096]
        assert y.requires_grad and len(large) == 1 and large[0].data_ptr() == x.data_ptr(), case
        frozen, kept[:] = [t.detach() for t in factors], []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            add(torch.zeros(4096, _width(case)), x, *frozen)
        assert all(t.numel() < 4096 for t in kept), case


def _width(case):
    _, _, y, _, _ = _make(case)
    return y.shape[-1]


@pytest.mark.filterwarnings("ignore:Converting a tensor", "ignore:`torch.jit.trace`")
@pytest.mark.parametrize("case", ["right first", "low rank", "even blocks"])
def test_compiled_and_traced(case):
    add, equation, y, x, factors = _make(case, dtype=torch.float32)
    inputs, dy = [y, x, *factors], torch.randn_like(y)

    def call(y, x, *factors):
        return add(y * 1, x, *factors)

    want = y + SCALING * equation(x, *factors)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = compiled(*inputs)
    torch.testing.assert_close(got, want)
    for g, w in zip(_grads(got, inputs, dy), _grads(want, inputs, dy), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
    # Where nothing needs a gradient, a compiler may lose the first argument of a function.
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), want)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(*[t.detach() for t in inputs]), want)
    traced = torch.jit.trace(call, [t.detach() for t in inputs], check_trace=False)
    torch.testing.assert_close(traced(*inputs), want)
    assert "PythonOp" not in str(traced.graph)


def test_second_derivatives_are_refused(monkeypatch):
    monkeypatch.setattr(kron, "SMALL", 0)
    add, _, y, x, factors = _make("right first")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(add(y.clone(), x, *factors).square().sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "w1, w2, error, message",
    [
        (torch.ones(2), torch.ones(3, 5), ValueError, r"w1 has shape \(2,\)"),
        (torch.ones(2, 3), torch.ones(3, 4), ValueError, r"takes 12 columns to 6, expected K = 15 to N = 6"),
        (torch.ones(3, 3), torch.ones(3, 5), ValueError, r"takes 15 columns to 9"),
        (torch.ones(2, 3), (torch.ones(3, 2), torch.ones(1, 5)), ValueError, "no product"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(3, 5), TypeError, "w1 has dtype int64"),
        (torch.ones(2, 3), [[1.0]], TypeError, "w2 must be a tensor"),
    ],
)
def test_bad_factors_are_named(w1, w2, error, message):
    with pytest.raises(error, match=message):
        add_kron(torch.zeros(4, 6), torch.zeros(4, 15), w1, w2)


def test_bad_blocks_and_scalings_are_named():
    y, x = torch.zeros(4, 6), torch.zeros(4, 15)
    for w in (torch.ones(2, 5), torch.ones(2, 4, 3), torch.ones(3, 5, 3)):
        with pytest.raises(ValueError, match=r"w has shape .*, expected \(N / b, K / b, b\)"):
            add_circulant(y, x, w)
    for add, factors in ((add_kron, (torch.ones(2, 3), torch.ones(3, 5))), (add_circulant, (torch.ones(2, 5, 3),))):
        with pytest.raises(TypeError, match="scaling must be a float"):
            add(y, x, *factors, torch.ones(1))

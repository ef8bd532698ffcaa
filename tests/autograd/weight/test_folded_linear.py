"""A linear layer whose weight gets a gradient: equation, dtypes, what is saved, which products are computed."""

from __future__ import annotations

import sys

import pytest
import torch

from peftkern import settings
from peftkern.autograd.weight.folded_linear import folded_linear

M, K, N = 6, 9, 7
MODULE = sys.modules["peftkern.autograd.weight.folded_linear"]


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """No layer counts as small."""
    monkeypatch.setattr(MODULE, "SMALL", -1)


def _leaves(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("shape", [(M, K), (2, 3, K), (K,), (0, K)])
def test_equation_and_gradients(shape):
    x, W, b = _leaves(shape, (N, K), (N,))
    y = folded_linear(x, W, b)
    torch.testing.assert_close(y, x @ W.t() + b)
    assert torch.autograd.gradcheck(folded_linear, (x, W, b))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (5, 130, 3), (300, 17, 65), (64, 1, 257)])
def test_ragged_shapes(m, n, k):
    x, W, b = _leaves((m, k), (n, k), (n,), dtype=torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (x, W, b)]
    answers = []
    for f, inputs in ((folded_linear, (x, W.t().contiguous().t(), b)), (torch.nn.functional.linear, exact)):
        y = f(*inputs)
        answers.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    for got, want in zip(*answers):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wide_weight_is_not_rounded(dtype):
    # W + change, where the change is below half an ulp of W's dtype.
    x, b = torch.randn(M, K).to(dtype).requires_grad_(), torch.randn(N).to(dtype).requires_grad_()
    W = (1 + torch.randn(N, K) * 1e-4).requires_grad_()
    y = folded_linear(x, W, b)
    dy = torch.randn(M, N)
    got = y, *torch.autograd.grad(y, [x, W, b], dy)
    exact = [t.detach().double().requires_grad_() for t in (x, W, b)]
    expected = torch.nn.functional.linear(*exact)
    want = expected, *torch.autograd.grad(expected, exact, dy.double())
    assert [t.dtype for t in got] == [torch.float32, dtype, torch.float32, dtype]
    for ours, right in zip(got, want):
        eps = 2e-6 if ours.dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), right, rtol=eps, atol=2e-6)


def test_a_narrow_weight_is_kept_as_it_is():
    x, W = torch.randn(M, K, requires_grad=True), torch.randn(N, K).bfloat16()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = folded_linear(x, W)
    assert y.dtype == torch.float32 and any(t is W for t in kept) and all(t.dtype == torch.bfloat16 for t in kept)
    torch.testing.assert_close(y, x @ W.float().t())
    y.sum().backward()
    torch.testing.assert_close(x.grad, W.float().sum(0).expand(M, K))


def test_autocast_multiplies_in_its_dtype():
    x, W, b = _leaves((M, K), (N, K), (N,), dtype=torch.float32)
    # By our product: torch's rounds the product too, before the bias is added.
    with torch.autocast("cpu", torch.bfloat16), settings.using(cpu_base="panels"):
        y = folded_linear(x, W, b)
    rounded = x.bfloat16().float() @ W.bfloat16().float().t() + b
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), rounded, rtol=2**-8, atol=1e-5)  # rounded once
    y.sum().backward()
    assert x.grad.dtype == W.grad.dtype == b.grad.dtype == torch.float32
    torch.testing.assert_close(W.grad, x.bfloat16().float().sum(0).expand(N, K), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    "trains, products, kept", [("x W", 3, 2), ("x", 2, 1), ("W", 2, 1), ("b", 1, 0)], ids=lambda value: str(value)
)
def test_only_what_is_needed(monkeypatch, trains, products, kept):
    plain, calls, saved = MODULE.base_product, [], []

    def counted(*args):
        calls.append(args)
        return plain(*args)

    monkeypatch.setattr(MODULE, "base_product", counted)
    x, W, b = _leaves((M, K), (N, K), (N,), dtype=torch.float32)
    for name, t in (("x", x), ("W", W), ("b", b)):
        t.requires_grad_(name in trains.split())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = folded_linear(x, W, b)
    y.sum().backward()
    assert (len(calls), len(saved)) == (products, kept)
    assert all(t.grad is not None for name, t in (("x", x), ("W", W), ("b", b)) if name in trains.split())


def test_a_changed_input_is_named():
    x, W = _leaves((M, K), (N, K), dtype=torch.float32)
    h = x * 1.0
    y = folded_linear(h, W)
    h.add_(1.0)
    with pytest.raises(RuntimeError, match="folded_linear: x was changed in place"):
        y.sum().backward()


def test_bad_input_is_named():
    x, W, b = _leaves((M, K), (N, K), (N,), dtype=torch.float32)
    with pytest.raises(ValueError, match="x has shape"):
        folded_linear(x[:, :-1], W)
    with pytest.raises(ValueError, match="bias"):
        folded_linear(x, W, b[:-1])


def test_a_small_layer_is_torchs(monkeypatch):
    x, W, b = _leaves((M, K), (N, K), (N,), dtype=torch.float32)
    monkeypatch.setattr(MODULE, "SMALL", M * K * N)
    assert "Folded" not in folded_linear(x, W, b).grad_fn.name()
    assert "Folded" in folded_linear(torch.cat([x, x]), W, b).grad_fn.name()
    assert "Folded" not in folded_linear(x.bfloat16(), W, b).grad_fn.name()
    assert "Folded" in folded_linear(x.bfloat16(), W.bfloat16(), b).grad_fn.name()
    with torch.autocast("cpu", torch.bfloat16):
        assert "Folded" in folded_linear(x, W, b).grad_fn.name()

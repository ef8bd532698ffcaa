"""The base product of a dropped input: equation, gradients, half precision, what is saved."""

from __future__ import annotations

import sys

import pytest
import torch

from peftkern.autograd.dropout_mask import zeroed
from peftkern.autograd.weight.dropped_base import dropped_base

M, K, N, P = 6, 9, 7, 0.4
SEED = torch.tensor([3])


@pytest.fixture
def panels(monkeypatch):
    """W in panels of two rows."""
    monkeypatch.setattr(sys.modules["peftkern.autograd.weight.dropped_base"], "PANEL", 2 * K + 1)


@pytest.mark.parametrize("shape", [(M, K), (2, 3, K), (0, K)])
def test_equation_and_gradients(shape):
    x, W = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(N, K, dtype=torch.float64)
    g = torch.randn(N, dtype=torch.float64, requires_grad=True)
    y = dropped_base(x, W, g, P, SEED)
    expected = zeroed(x, P, SEED) / (1 - P) @ W.t() * g
    torch.testing.assert_close(y, expected)
    assert torch.autograd.gradcheck(lambda x, g: dropped_base(x, W, g, P, SEED), (x, g))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_multiplied_in_fp32(panels, dtype):
    x, W, g = torch.randn(M, K).to(dtype).requires_grad_(), torch.randn(N, K).to(dtype), torch.randn(N).requires_grad_()
    y = dropped_base(x, W, g, P, SEED)
    dy = torch.randn(M, N)
    dx, dg = torch.autograd.grad(y, [x, g], dy)
    exact = [t.detach().double().requires_grad_() for t in (x, g)]
    expected = dropped_base(exact[0], W.double(), exact[1], P, SEED)
    assert (y.dtype, dx.dtype, dg.dtype) == (torch.float32, dtype, torch.float32)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    want_x, want_g = torch.autograd.grad(expected, exact, dy.double())
    torch.testing.assert_close(dg.double(), want_g, rtol=1e-5, atol=1e-5)
    # Once rounded: half an ulp.
    torch.testing.assert_close(dx.double(), want_x, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


def test_autocast_multiplies_in_its_dtype():
    x, W, g = torch.randn(M, K, requires_grad=True), torch.randn(N, K), torch.randn(N, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = dropped_base(x, W, g, P, SEED)
    rounded = (zeroed(x, P, SEED).bfloat16().float() @ W.bfloat16().float().t()).bfloat16()
    torch.testing.assert_close(y, rounded * (g / (1 - P)), rtol=2**-7, atol=1e-6)
    y.sum().backward()
    assert x.grad.dtype == g.grad.dtype == torch.float32


@pytest.mark.parametrize("trained", [True, False])
def test_saved(trained):
    x, W, g = torch.randn(M, K, requires_grad=True), torch.randn(N, K), torch.randn(N, requires_grad=trained)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropped_base(x, W, g, P, SEED)
    own = {t.data_ptr() for t in (W, g, SEED)}
    assert [t.shape for t in saved if t.data_ptr() not in own] == [(M, N)] * trained

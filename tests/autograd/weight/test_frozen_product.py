"""The product of few rows and a frozen weight: values, gradient, panels, autocast."""

from __future__ import annotations

import sys

import pytest
import torch

from peftkern.autograd.weight.frozen_product import frozen_product

R, K, N = 3, 11, 9


def test_gradient():
    x, W = torch.randn(R, K, dtype=torch.float64, requires_grad=True), torch.randn(N, K, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: frozen_product(x, W), (x,))
    torch.testing.assert_close(frozen_product(x, W), x @ W.t())


@pytest.mark.parametrize("strides", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_wide_as_the_rows_in_panels_and_under_autocast(monkeypatch, dtype, strides):
    monkeypatch.setattr(sys.modules["peftkern.autograd.weight.dropped_base"], "PANEL", 2 * K + 1)
    x = torch.randn(R, K, requires_grad=True)
    W = torch.randn(N, K).to(dtype) if strides == "rows" else torch.randn(K, N).to(dtype).t()
    dy = torch.randn(N, R).t()
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen_product(x, W)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == torch.float32
    for got, want in ((y, x.double() @ W.double().t()), (dx, dy.double() @ W.double())):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_the_weight_gets_no_gradient():
    x, W = torch.randn(R, K, requires_grad=True), torch.randn(N, K, requires_grad=True)
    frozen_product(x, W).sum().backward()
    assert W.grad is None and x.grad is not None

"""lora_conv against its equation: forward and every gradient, with the branch folded into W and beside it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from peftkern.autograd import lora_conv as module
from peftkern.autograd.lora_conv import Call, Geometry, lora_conv

C, N, R, S = 5, 4, 3, 0.7
# Spatial shape, kernel, geometry.
CASES = {
    "1d": ((9,), (3,), Geometry((2,), (1,), (1,))),
    "2d": ((6, 5), (3, 2), Geometry((1, 2), (2, 0), (1, 1))),
    "1x1": ((4, 5), (1, 1), Geometry((1, 1), (0, 0), (1, 1))),
    "patches": ((4, 6), (2, 3), Geometry((2, 3), (0, 0), (1, 1))),
    "3d": ((3, 4, 3), (2, 1, 3), Geometry((1, 1, 2), (0, 1, 1), (1, 1, 1))),
}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _case(name, batch=2, dtype=torch.float64):
    space, kernel, of = CASES[name]
    shapes = ((batch, C, *space), (N, C, *kernel), (R, C, *kernel), (N, R, *[1] * len(kernel)), (N,))
    return [torch.randn(shape, dtype=dtype) for shape in shapes], of


def _equation(x, W, A, B, b, of, dropped=None):
    conv, (stride, padding, dilation) = _CONV[len(of.stride)], of
    u = conv(x if dropped is None else dropped, A, None, stride, padding, dilation)
    return conv(x, W, b, stride, padding, dilation) + S * conv(u, B)


@pytest.fixture(params=[(0, 0), (10**9, 10**9)], ids=["folded", "beside"])
def way(request, monkeypatch):
    """Both ways of computing a layer without dropout, whatever its size."""
    monkeypatch.setattr(module, "ROWS", request.param)
    return request.param


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equation_and_gradients(way, name, channels_last):
    tensors, of = _case(name)
    if channels_last and tensors[0].dim() == 4:
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    leaves = [t.requires_grad_() for i, t in enumerate(tensors) if i != 1]
    y, expected = lora_conv(*tensors, Call(of, S)), _equation(*tensors, of)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(expected)
    for got, want in zip(*(torch.autograd.grad(t, leaves, dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(way, name):
    (x, W, A, B, b), of = _case(name)
    for t in (x, A, B, b):
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, A, B, b: lora_conv(x, W, A, B, b, Call(of, S)), (x, A, B, b))


@pytest.mark.parametrize("name", ["1d", "2d"])
def test_another_input_of_the_branch(name):
    (x, W, A, B, b), of = _case(name)
    dropped = torch.randn_like(x)
    for t in (x, A, B, b, dropped):
        t.requires_grad_()
    torch.testing.assert_close(
        lora_conv(x, W, A, B, b, Call(of, S), dropped), _equation(x, W, A, B, b, of, dropped), rtol=1e-12, atol=1e-12
    )
    assert torch.autograd.gradcheck(
        lambda x, A, B, b, d: lora_conv(x, W, A, B, b, Call(of, S), d), (x, A, B, b, dropped)
    )


@pytest.mark.parametrize("needed", ["x", "A", "B", "b", "A B", "x B"])
def test_what_is_frozen_gets_no_gradient(way, needed):
    (x, W, A, B, b), of = _case("2d")
    named = {"x": x, "A": A, "B": B, "b": b}
    leaves = [named[name].requires_grad_() for name in needed.split()]
    dy = torch.randn_like(_equation(x, W, A, B, b, of))
    found = torch.autograd.grad(lora_conv(x, W, A, B, b, Call(of, S)), leaves, dy)
    for got, want in zip(found, torch.autograd.grad(_equation(x, W, A, B, b, of), leaves, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_empty_batch(way):
    (x, W, A, B, b), of = _case("2d", batch=0)
    for t in (x, A, B, b):
        t.requires_grad_()
    y = lora_conv(x, W, A, B, b, Call(of, S))
    y.sum().backward()
    assert y.shape == _equation(x, W, A, B, b, of).shape
    assert x.grad.shape == x.shape and not any(t.grad.any() for t in (A, B, b))


def test_what_is_saved(monkeypatch):
    monkeypatch.setattr(module, "ROWS", (0, 0))
    (x, W, A, B, b), of = _case("2d")
    own, kept = {t.data_ptr() for t in (W, A, B)}, []
    x.requires_grad_()
    for leaf in (None, A, B):  # x and nothing else, if it is read
        if leaf is not None:
            leaf.requires_grad_()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            lora_conv(x, W, A, B, b, Call(of, S))
        rest = [t.data_ptr() for t in kept if t.data_ptr() not in own]
        assert rest == ([] if leaf is None else [x.data_ptr()])


def test_no_second_derivative(monkeypatch):
    monkeypatch.setattr(module, "ROWS", (0, 0))
    (x, W, A, B, b), of = _case("1d")
    y = lora_conv(x.requires_grad_(), W, A, B, b, Call(of, S))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_both_ways_without_gradients(way):
    tensors, of = _case("2d")
    torch.testing.assert_close(lora_conv(*tensors, Call(of, S)), _equation(*tensors, of), rtol=1e-12, atol=1e-12)

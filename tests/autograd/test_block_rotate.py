"""block_rotate and neumann under autograd, autocast and a compiler: every gradient, what is saved."""

from __future__ import annotations

import pytest
import torch

from peftkern.autograd.block_rotate import block_rotate
from peftkern.autograd.neumann import neumann, skew

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def operands(dtype=F64, blocks=3, size=4, lead=(5,)):
    x = torch.randn(*lead, 12, dtype=F64).to(dtype).requires_grad_()
    return x, torch.randn(blocks, size, size, dtype=F64).to(dtype).requires_grad_(), torch.randperm(12)


@pytest.mark.parametrize("blocks", [3, 1])
@pytest.mark.parametrize("permuted", [False, True])
def test_gradcheck(blocks, permuted):
    x, R, index = operands(blocks=blocks, lead=(2, 3))
    assert torch.autograd.gradcheck(lambda x, R: block_rotate(x, R, index if permuted else None), (x, R))


def test_gradients_have_their_inputs_dtypes_and_only_those_that_are_needed():
    x, R, _ = operands(BF16)
    R = R.detach().float().requires_grad_()
    y = block_rotate(x, R)
    dx, dR = torch.autograd.grad(y, (x, R), torch.ones_like(y))
    assert (y.dtype, dx.dtype, dR.dtype) == (BF16, BF16, F32)
    for given, frozen in (((x, R.detach()), "R"), ((x.detach(), R), "x")):
        y = block_rotate(*given)
        trains = x if frozen == "R" else R
        expected = dx if frozen == "R" else dR
        assert torch.equal(torch.autograd.grad(y, trains, torch.ones_like(y))[0], expected)
    assert not block_rotate(x.detach(), R.detach()).requires_grad


def test_a_frozen_matrix_keeps_no_x():
    x, R, _ = operands(F32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        block_rotate(x, R.detach())
        assert kept == [R.shape]
        kept.clear()
        block_rotate(x, R)
        assert sorted(kept) == sorted([R.shape, x.shape])


def test_an_input_that_changed_is_named(monkeypatch):
    x, R, _ = operands(F32)
    h = x * 1
    y = block_rotate(h, R)
    h.add_(1.0)
    with pytest.raises(RuntimeError, match="block_rotate: x was changed in place"):
        y.sum().backward()
    monkeypatch.setenv("PEFTKERN_SAVE_INPUT", "copy")
    h = x * 1
    y = block_rotate(h, R)
    h.add_(1.0)
    (dR,) = torch.autograd.grad(y.sum(), R)
    torch.testing.assert_close(dR, x.detach().sum(0).view(3, 4, 1).expand(3, 4, 4))


def test_autocast():
    x, R, index = operands(F32)
    with torch.autocast("cpu", BF16):
        y = block_rotate(x, R, index)
    assert y.dtype == BF16 and torch.equal(y, block_rotate(x.to(BF16), R, index))
    dx, dR = torch.autograd.grad(y, (x, R), torch.ones_like(y))
    assert dx.dtype == dR.dtype == F32


def test_second_derivatives_and_transforms_are_refused():
    x, R, _ = operands(F32)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(block_rotate(x, R).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: block_rotate(x, R.detach()).sum())(x.detach())


def test_compiled():
    x, R, index = operands(F32)
    rows, cols = torch.triu_indices(4, 4, 1)
    upper = torch.randn(3, 6, requires_grad=True)

    def step(x, upper):
        return block_rotate(x, neumann(upper, rows, cols, 4, (1.0, 2.0, 2.0, 1.0)), index)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(x, upper).square().sum(), (x, upper)) for f in (step, compiled)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "c", [(1.0,), (1.0, 2.0), (0.5, 0.3, 0.7), (1.0, 2.0, 2.0, 1.0), (1, 2, 3, 4, 5), tuple(range(8))]
)
def test_series(c):
    rows, cols = torch.triu_indices(5, 5, 1)
    upper = torch.randn(3, 10, dtype=F64, requires_grad=True)
    Q = skew(upper, rows, cols, 5)
    assert torch.equal(Q, -Q.transpose(1, 2)) and torch.equal(Q[:, rows, cols], upper)
    expected = sum(f * torch.linalg.matrix_power(Q, k) for k, f in enumerate(c))
    torch.testing.assert_close(neumann(upper, rows, cols, 5, c), expected.expand(3, 5, 5))
    assert torch.autograd.gradcheck(lambda u: neumann(u, rows, cols, 5, c), upper)


def test_series_in_other_dtypes():
    rows, cols = torch.triu_indices(5, 5, 1)
    for dtype in (BF16, F32):
        upper = torch.randn(3, 10, dtype=dtype, requires_grad=True)
        plain = neumann(upper, rows, cols, 5, (1.0, 2.0, 1.0))
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(neumann(upper, rows, cols, 5, (1.0, 2.0, 1.0)), plain)
        (grad,) = torch.autograd.grad(plain.sum(), upper)
        assert plain.dtype == F32 and grad.dtype == dtype

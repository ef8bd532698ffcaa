"""Rotated pairs of columns: every size of the vectors in fp64, blocks of rows, what is saved, bad input."""

from __future__ import annotations

import pytest
import torch

from peftkern.autograd import pair_rotate as module
from peftkern.autograd.pair_rotate import pair_rotate

GROUP, N = 6, 12


def _expected(x, theta, alpha):
    # As a matrix (N, N), an element at a time.
    half, share = GROUP // 2, len(theta) / N
    R = x.new_zeros(N, N)
    for a in (n for n in range(N) if n % GROUP < half):
        b, group = a + half, a // GROUP
        if share == 0.5:
            i = group * half + a % GROUP
            at = (i, i, i, i)  # of c_a, s_a, c_b, s_b
        else:
            at = (a, a, b, b) if share == 1 else (a + group * GROUP, a + (group + 1) * GROUP) * 2
            at = at if share == 1 else (at[0], at[1], at[0] + half, at[1] + half)
        c_a, s_a, c_b, s_b = ((alpha[i] * (torch.sin if k % 2 else torch.cos)(theta[i])) for k, i in enumerate(at))
        for row, column, value in ((a, a, c_a), (a, b, -s_a), (b, b, c_b), (b, a, s_b)):
            R = R.index_put((torch.tensor([row]), torch.tensor([column])), value)
    return x @ R.t()


def _case(size, *shape, dtype=torch.float64):
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((*shape, N), (size,), (size,))]


@pytest.mark.parametrize("block", [1, module.BLOCK], ids=["blocks", "one block"])
@pytest.mark.parametrize("size", [N // 2, N, 2 * N])
def test_equation_and_gradients(monkeypatch, size, block):
    monkeypatch.setattr(module, "BLOCK", block)
    inputs = _case(size, 3, 67)
    y, expected = pair_rotate(*inputs, GROUP), _expected(*inputs)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, inputs, dy) for t in (y, expected)))


@pytest.mark.parametrize("size", [N // 2, N, 2 * N])
def test_gradcheck(size):
    inputs = _case(size, 5)
    for trains in range(1, 8):
        some = [t.detach().requires_grad_(bool(trains >> i & 1)) for i, t in enumerate(inputs)]
        assert torch.autograd.gradcheck(lambda *t: pair_rotate(*t, GROUP), some)


def test_x_is_saved_for_the_vectors_alone():
    x, theta, alpha = _case(N, 5)
    assert pair_rotate(x, theta.detach(), alpha.detach(), GROUP).grad_fn is not None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        pair_rotate(x, theta.detach(), alpha.detach(), GROUP)
    assert max(kept) == N


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    x, *vectors = _case(N, 300, dtype=dtype)
    exact = _expected(*(t.double() for t in (x, *vectors)))
    assert (
        torch.equal(pair_rotate(x, *vectors, GROUP), exact.to(dtype))
        or (
            (pair_rotate(x, *vectors, GROUP).double() - exact).abs()
            <= torch.finfo(dtype).eps * 0.51 * exact.abs() + 1e-6
        ).all()
    )


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_rows(shape):
    x, theta, alpha = _case(N, *shape)
    y = pair_rotate(x, theta, alpha, GROUP)
    y.sum().backward()
    assert y.shape == x.shape and not theta.grad.any() and not alpha.grad.any()


def test_bad_input():
    x, v = torch.randn(3, N), torch.randn(N)
    for group in (0, 1, 3, 8, -2):
        with pytest.raises(ValueError, match="group_size is"):
            pair_rotate(x, v, v, group)
    with pytest.raises(ValueError, match="road_theta has shape"):
        pair_rotate(x, v[:5], v[:5], GROUP)
    with pytest.raises(ValueError, match="road_theta has shape"):
        pair_rotate(x, v[None], v[None], GROUP)
    with pytest.raises(ValueError, match="road_alpha"):
        pair_rotate(x, v, v[:6], GROUP)

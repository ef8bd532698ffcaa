"""The native series of skew-symmetric matrices and its gradient: fp64, guarded memory, bits, places that are not there."""

from __future__ import annotations

import pytest
import torch

from peftkern import settings
from peftkern.autograd.neumann import neumann
from peftkern.backends.cpu import call

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

C = (1.0, 2.0, 2.0, 2.0, 1.0)


def operands(G, b, count=5):
    rows, cols = torch.triu_indices(b, b, 1)
    c = C if count == 5 else tuple(torch.rand(count).tolist())
    return torch.randn(G, rows.numel()) / max(b, 4), rows, cols, b, c, torch.randn(G, b, b)


def by_torch(upper, rows, cols, b, c, d):
    """R and the gradient by torch's own products."""
    upper = upper.clone().requires_grad_()
    with settings.using(backend="reference"):
        R = neumann(upper, rows, cols, b, c)
        return R.detach(), *torch.autograd.grad(R, upper, d)


@pytest.mark.parametrize(
    "G, b, count", [(1, 1, 5), (3, 2, 5), (2, 5, 7), (5, 16, 5), (7, 17, 9), (9, 32, 5), (2, 33, 33), (1, 256, 5)]
)
def test_accuracy(level, G, b, count):
    upper, rows, cols, b, c, d = operands(G, b, count)
    ours = [call.skew_series(2, upper, rows, cols, b, c, each) for each in (None, d)]
    stock = by_torch(upper, rows, cols, b, c, d)
    exact = by_torch(upper.double(), rows, cols, b, c, d.double())
    for a, t, e in zip(ours, stock, exact, strict=True):
        assert a.shape == t.shape and a.dtype == torch.float32
        error, allowed = ((each.double() - e).norm().item() for each in (a, t))
        assert error <= max(1.5 * allowed, 4 * torch.finfo(torch.float32).eps * e.norm().item())


def test_places_as_they_are_named(level):
    # Not in order, some of them below the diagonal, not all there.
    rows, cols = torch.tensor([3, 0, 2, 4]), torch.tensor([1, 4, 0, 3])
    upper, d = torch.randn(3, 4), torch.randn(3, 5, 5)
    for given, want in zip((None, d), by_torch(upper, rows, cols, 5, C, d), strict=True):
        torch.testing.assert_close(call.skew_series(1, upper, rows, cols, 5, C, given), want)


def test_threads_and_other_blocks_do_not_change_bits(level):
    upper, rows, cols, b, c, d = operands(70, 19)
    R, grad = (call.skew_series(1, upper, rows, cols, b, c, each) for each in (None, d))
    for threads in (2, 64):
        assert torch.equal(call.skew_series(threads, upper, rows, cols, b, c, None), R)
        assert torch.equal(call.skew_series(threads, upper, rows, cols, b, c, d), grad)
    assert torch.equal(call.skew_series(1, upper[5:9], rows, cols, b, c, d[5:9]), grad[5:9])


def test_results_alone_are_written(level, guarded_results):
    for G, b in ((1, 1), (4, 7), (2, 32), (3, 45)):
        upper, rows, cols, b, c, d = operands(G, b)
        assert call.skew_series(2, upper, rows, cols, b, c, None).isfinite().all()
        assert call.skew_series(2, upper, rows, cols, b, c, d).isfinite().all()
    assert guarded_results.check() == 8
    assert call.skew_series(2, torch.empty(0, 6), *operands(1, 4)[1:5], None).shape == (0, 4, 4)


def test_calls_that_are_not_ordinary():
    upper, rows, cols, b, c, d = operands(3, 4)
    for bad in (
        (0, upper, rows, cols, b, c, d), (1, upper, rows, cols, b, c), (1, upper.double(), rows, cols, b, c, d),
        (1, upper.bfloat16(), rows, cols, b, c, d), (1, upper[0], rows, cols, b, c, d), (1, upper[:, ::2], rows, cols, b, c, d),
        (1, upper, rows[1:], cols, b, c, d), (1, upper, rows.int(), cols, b, c, d), (1, upper, rows, cols, 257, c, d),
        (1, upper, rows, cols, b, c[:4], d), (1, upper, rows, cols, b, c[:3], d), (1, upper, rows, cols, b, list(c), d),
        (1, upper, rows, cols, b, (1.0,) * 35, d), (1, upper, rows, cols, b, ("1", *c[1:]), d),
        (1, upper, rows, cols, b, c, d[1:]), (1, upper, rows, cols, b, c, d.transpose(1, 2)),
    ):  # fmt: skip
        assert call.skew_series(*bad) is None
    for wrong in (4, -1):
        for places in ((torch.full((6,), wrong), cols), (rows, torch.full((6,), wrong))):
            with pytest.raises(IndexError, match="outside of a matrix of 4 rows"):
                call.skew_series(1, upper, *places, b, c, None)


def test_the_method_runs_it(monkeypatch):
    upper, rows, cols, b, c, d = operands(3, 8)
    upper.requires_grad_()
    seen, entry = [], call.skew_series

    def counted(*args):
        seen.append(args)
        return entry(*args)

    monkeypatch.setattr(call, "skew_series", counted)
    R = neumann(upper, rows, cols, b, c)
    with torch.no_grad():
        upper.mul_(2.0)  # as the library projects it: backward is of what it was
    (grad,) = torch.autograd.grad(R, upper, d.transpose(1, 2))
    want = by_torch(upper.detach() / 2, rows, cols, b, c, d.transpose(1, 2))
    torch.testing.assert_close((R, grad), want)
    assert len(seen) == 2
    with torch.profiler.profile():  # somebody watches between the passes
        again = neumann(upper, rows, cols, b, c)
    assert len(seen) == 2
    R = neumann(upper, rows, cols, b, c)
    with torch.profiler.profile():
        (late,) = torch.autograd.grad(R, upper, d)
    (want,) = torch.autograd.grad(again, upper, d)
    torch.testing.assert_close(late, want)
    assert len(seen) == 3

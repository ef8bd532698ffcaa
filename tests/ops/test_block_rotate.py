"""block_rotate and its gradient: the equation, any layout, bad input, in any dtype."""

from __future__ import annotations

import pytest
import torch

import peftkern.ops.block_rotate as op

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
fwd, bwd = torch.ops.peftkern.block_rotate_fwd, torch.ops.peftkern.block_rotate_bwd


@pytest.fixture(autouse=True, params=["reference", "auto"])
def backend(request, monkeypatch):
    """The definition, and what a user gets."""
    monkeypatch.setenv("PEFTKERN_BACKEND", request.param)
    return request.param


def operands(M, blocks, size, dtype=F64, matrix=None, shared=False):
    g = torch.Generator().manual_seed(M + blocks + size)
    x, dy = (torch.randn(M, blocks * size, generator=g, dtype=F64).to(dtype) for _ in range(2))
    R = torch.randn(1 if shared else blocks, size, size, generator=g, dtype=F64)
    return x, R.to(matrix or dtype), dy, torch.randperm(blocks * size, generator=g)


def by_element(x, R, dy, index):
    """Both equations, a sum at a time."""
    K, b = x.shape[1], R.shape[-1]
    at = index if index is not None else torch.arange(K)
    y, dR = torch.zeros_like(x), x.new_zeros((K // b, b, b))
    for g in range(K // b):
        for i in range(b):
            for j in range(b):
                y[:, at[g * b + j]] += x[:, at[g * b + i]] * R[g if len(R) > 1 else 0, i, j]
                dR[g, i, j] = (x[:, at[g * b + i]] * dy[:, at[g * b + j]]).sum()
    return y, dR


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("M, blocks, size", [(1, 1, 1), (5, 3, 4), (30, 2, 9), (7, 5, 2)])
def test_the_equation(M, blocks, size, permuted, shared):
    for dtype, tolerance in ((F64, 1e-12), (F32, 1e-5)):
        x, R, dy, index = operands(M, blocks, size, dtype, shared=shared)
        index = index if permuted else None
        y, dR = by_element(x.double(), R.double(), dy.double(), index)
        torch.testing.assert_close(fwd(x, R, index), y.to(dtype), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(bwd(x, dy, size, index), dR.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision_is_rounded_once(dtype):
    x, R, dy, index = operands(40, 3, 8, dtype, F32)
    y, dR = by_element(x.double(), R.double(), dy.double(), index)
    got = fwd(x, R, index)
    assert got.dtype == dtype and (got.double() - y).abs().max() <= y.abs().max() * torch.finfo(dtype).eps / 2
    got = bwd(x, dy, 8, index)
    assert got.dtype == F32
    torch.testing.assert_close(got, dR.float())


def test_any_layout():
    x, R, dy, index = operands(9, 3, 4, F32)
    y, dR = fwd(x, R, index), bwd(x, dy, 4, index)
    wide = torch.full((9, 30), float("nan"))
    wide[:, :12] = x
    for other in (wide[:, :12], x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2]):
        for r in (R, R.transpose(1, 2).contiguous().transpose(1, 2), R.repeat_interleave(2, 0)[::2]):
            assert torch.equal(fwd(other, r, index), y)
        torch.testing.assert_close(bwd(other, dy, 4, index), dR)


def test_a_block_of_any_size():
    for size in (1, 255, 256, 257, 300):
        x, R, dy, _ = operands(5, 2, size, F32)
        exact = torch.bmm(x.double().view(5, 2, size).transpose(0, 1), R.double()).transpose(0, 1).flatten(1)
        torch.testing.assert_close(fwd(x, R).double(), exact, rtol=1e-4, atol=1e-4)
        exact = torch.bmm(*(t.double().view(5, 2, size).permute(p) for t, p in ((x, (1, 2, 0)), (dy, (1, 0, 2)))))
        torch.testing.assert_close(bwd(x, dy, size).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("M, K", [(0, 8), (3, 0), (0, 0)])
def test_nothing_to_add(M, K):
    x = torch.randn(M, K)
    assert fwd(x, torch.randn(1, 4, 4)).shape == (M, K)
    assert torch.equal(bwd(x, x, 4), torch.zeros(K // 4, 4, 4))


def test_rows_go_in_parts(monkeypatch):
    x, R, dy, index = operands(23, 3, 4)
    expected = by_element(x, R, dy, index)
    for scratch in (1, 12, 100):
        monkeypatch.setattr(op, "SCRATCH", scratch)
        torch.testing.assert_close((fwd(x, R, index), bwd(x, dy, 4, index)), expected)


def test_opcheck():
    x, R, dy, index = operands(6, 3, 4, F32)
    torch.library.opcheck(fwd.default, (x, R, index))
    torch.library.opcheck(bwd.default, (x, dy, 4, None))


X, SQUARE, ORDER = torch.randn(3, 12), torch.randn(3, 4, 4), torch.randperm(12)
BAD = {
    "x is 1-D": (X[0], SQUARE, None, ValueError, "x has shape"),
    "x is integer": (X.long(), SQUARE, None, TypeError, "x has dtype"),
    "R is 2-D": (X, SQUARE[0], None, ValueError, "R has shape"),
    "R is not square": (X, SQUARE[:, 1:], None, ValueError, "R has shape"),
    "R has too few blocks": (X, SQUARE[:2], None, ValueError, "R has shape"),
    "R has no columns": (X, SQUARE[:, :0, :0], None, ValueError, "R has shape"),
    "R does not divide K": (X, torch.randn(1, 5, 5), None, ValueError, "R has shape"),
    "R is fp64": (X, SQUARE.double(), None, TypeError, "R has dtype"),
    "R is elsewhere": (X, SQUARE.to("meta"), None, ValueError, "R is on meta"),
    "index is short": (X, SQUARE, ORDER[1:], ValueError, "index has shape"),
    "index is int32": (X, SQUARE, ORDER.int(), TypeError, "index has dtype"),
    "index is beyond K": (X, SQUARE, ORDER + 1, IndexError, "index"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    x, R, index, error, match = BAD[case]
    with pytest.raises(error, match=match):
        fwd(x, R, index)


def test_bad_input_of_the_gradient():
    for dy, size, match in ((X[:2], 4, "dy has shape"), (X, 5, "size is 5"), (X, 0, "size is 0")):
        with pytest.raises(ValueError, match=match):
            bwd(X, dy, size)
    with pytest.raises(IndexError, match="index"):
        bwd(X, X, 4, ORDER - 1 + (ORDER == 0) * 50)

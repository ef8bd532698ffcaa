"""expert_lora_linear against every expert by itself: forward, every gradient, dropout by its masks, bad input, memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

import peftkern

E, N, K, R = 5, 11, 13, 3
COUNTS = {"ragged": [4, 0, 1, 7, 2], "one": [0, 0, 9, 0, 0], "tail": [3, 0, 0, 2, 1], "none": [0] * E}
M = {"ragged": 14, "one": 9, "tail": 9, "none": 2}


def _operands(case, dtype=torch.float64, adapter=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((M[case], K), (E, N, K), (E, R, K), (E, N, R), (E, N))
    x, W, A, B, b = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    A, B = (t.to(adapter or dtype).requires_grad_() for t in (A, B))
    return x.to(dtype).requires_grad_(), W.to(dtype), A, B, b.to(dtype).requires_grad_()


def _one_by_one(x, W, A, B, b, counts, scaling, keep=None):
    """The equation. ``keep``: of each expert the factors of its branch's input."""
    parts, y = x.split([*counts, len(x) - sum(counts)]), []
    for e, rows in enumerate(parts[:-1]):
        dropped = rows if keep is None else rows * keep[e]
        y.append(linear(rows, W[e], b[e]) + scaling * linear(linear(dropped, A[e]), B[e]))
    return torch.cat([*y, x.new_zeros(len(parts[-1]), N)])


def _step(y, grad, tensors):
    return [y, *torch.autograd.grad(y, tensors, grad, materialize_grads=True)]


@pytest.mark.parametrize("case", COUNTS)
def test_equation(case):
    x, W, A, B, b = _operands(case)
    grad = torch.randn(M[case], N, dtype=x.dtype)
    ours = peftkern.expert_lora_linear(x, W, A, B, COUNTS[case], bias=b, scaling=0.7)
    wanted = _one_by_one(x, W, A, B, b, COUNTS[case], 0.7)
    if case == "none":
        assert torch.equal(ours, wanted) and not ours.requires_grad
        return
    torch.testing.assert_close(_step(ours, grad, (x, A, B, b)), _step(wanted, grad, (x, A, B, b)))
    # Counts in a tensor, weights of any strides, no bias.
    transposed = W.transpose(1, 2).contiguous().transpose(1, 2)
    again = peftkern.expert_lora_linear(x, transposed, A, B, torch.tensor(COUNTS[case]), scaling=0.7)
    torch.testing.assert_close(again, _one_by_one(x, W, A, B, torch.zeros_like(b), COUNTS[case], 0.7))


@pytest.mark.parametrize("case", ["ragged", "tail"])
def test_dropout_by_the_masks_of_each_expert(case):
    x, W, A, B, b = _operands(case)
    counts, p = COUNTS[case], 0.4
    keep = [peftkern.dropout_mask(n, K, p, 9 + e).double() / (1 - p) for e, n in enumerate(counts)]
    grad = torch.randn(M[case], N, dtype=x.dtype)
    ours = peftkern.expert_lora_linear(x, W, A, B, counts, bias=b, dropout_p=p, training=True, seed=9)
    wanted = _one_by_one(x, W, A, B, b, counts, 1.0, keep)
    torch.testing.assert_close(_step(ours, grad, (x, A, B, b)), _step(wanted, grad, (x, A, B, b)))
    still = peftkern.expert_lora_linear(x, W, A, B, counts, bias=b, dropout_p=p)
    torch.testing.assert_close(still, _one_by_one(x, W, A, B, b, counts, 1.0))
    torch.manual_seed(0)
    drawn = [
        peftkern.expert_lora_linear(x, W, A, B, counts, bias=b, dropout_p=p, training=True, seed=None) for _ in range(2)
    ]
    assert not torch.equal(*drawn)


def test_autocast():
    x, W, A, B, b = _operands("ragged", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = peftkern.expert_lora_linear(x, W, A, B, COUNTS["ragged"], bias=b)
        eager = _one_by_one(x, W, A, B, b, COUNTS["ragged"], 1.0)
    assert y.dtype == torch.bfloat16
    exact = _one_by_one(*(t.double() for t in (x, W, A, B, b)), COUNTS["ragged"], 1.0)
    error, allowed = ((t.double() - exact).norm() for t in (y, eager))
    assert error <= 1.5 * allowed


def test_an_expert_without_rows_is_not_read():
    x, W, A, B, b = _operands("ragged")
    with torch.no_grad():
        W[1], A[1] = float("nan"), float("nan")
    y = peftkern.expert_lora_linear(x, W, A, B, COUNTS["ragged"], bias=b)
    y.sum().backward()
    assert torch.isfinite(y).all() and not A.grad[1].any() and not B.grad[1].any()


BAD = {
    "x": ({"x": torch.zeros(2, 3, K)}, ValueError, r"x has shape \(2, 3, 13\), expected \(M, K\)"),
    "weight": ({"weight": torch.zeros(N, K)}, ValueError, "weight has shape"),
    "experts": ({"lora_A": torch.zeros(E - 1, R, K)}, ValueError, "lora_A has shape"),
    "ranks": ({"lora_B": torch.zeros(E, N, R + 1)}, ValueError, "lora_B has shape"),
    "bias": ({"bias": torch.zeros(N)}, ValueError, r"bias has shape \(11,\), expected \(E, N\)"),
    "few counts": ({"counts": [14]}, ValueError, r"counts is \[14\]"),
    "one count": ({"counts": 14}, TypeError, "counts must be a sequence of ints or a tensor, got int"),
    "no counts": ({"counts": None}, TypeError, "counts must be a sequence"),
    "counts without a dimension": ({"counts": torch.tensor(14)}, ValueError, r"counts is \[14\]"),
    "many rows": ({"counts": [15, 0, 0, 0, 0]}, ValueError, "of 14 together at most"),
    "negative": ({"counts": [15, -1, 0, 0, 0]}, ValueError, "counts is"),
    "fractions": ({"counts": [1.0] * E}, ValueError, "counts is"),
    "trained": ({"weight": torch.zeros(E, N, K, requires_grad=True)}, ValueError, "weight requires grad"),
    "list": ({"lora_A": [1]}, TypeError, "lora_A must be a tensor"),
    "p": ({"dropout_p": 1.5}, ValueError, "dropout_p"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    changed, error, message = BAD[what]
    x, W, A, B, _ = _operands("ragged", torch.float32)
    arguments = {"x": x, "weight": W, "lora_A": A, "lora_B": B, "counts": COUNTS["ragged"], **changed}
    with pytest.raises(error, match=message):
        peftkern.expert_lora_linear(**arguments)

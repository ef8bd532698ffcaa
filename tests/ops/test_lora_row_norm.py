"""lora_row_norm: the equation, as HF PEFT's DoRA computes it, in any dtype and layout."""

from __future__ import annotations

import pytest
import torch

import peftkern.ops.lora_row_norm as op
from peftkern.testing.accuracy import FACTOR, ulp

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True, params=["reference", "auto"])
def backend(request, monkeypatch):
    """The definition, and what a user gets."""
    monkeypatch.setenv("PEFTKERN_BACKEND", request.param)
    return request.param


def norm(weight, lora_A, lora_B, scaling):
    return torch.ops.peftkern.lora_row_norm([weight], "dense", lora_A, lora_B, scaling)


def operands(N, K, R, dtype=F32, adapter=F32, size=0.05, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        (size * torch.randn(N, K, generator=g, dtype=F64)).to(dtype),
        torch.randn(R, K, generator=g, dtype=F64).to(adapter),
        (0.1 * torch.randn(N, R, generator=g, dtype=F64)).to(adapter),
    )


def eager(weight, lora_A, lora_B, scaling):
    """HF PEFT's order of operations: the whole sum, then its norm."""
    return torch.linalg.norm(weight + scaling * (lora_B @ lora_A), dim=1)


@pytest.mark.parametrize("dtype, adapter", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16), (F64, F64)])
@pytest.mark.parametrize("N, K, R", [(1, 1, 1), (7, 13, 3), (40, 300, 16), (3, 5, 64)])
@pytest.mark.parametrize("size", [0.05, 0.0])
def test_as_close_as_eager(N, K, R, dtype, adapter, size):
    """Of many draws together: one row's error is a random number."""
    ours, theirs, floor = [], [], []
    for seed in range(1 + 256 // N):
        t = operands(N, K, R, dtype, adapter, size, seed)
        exact = eager(*(m.double() for m in t), 0.75)
        got = norm(*t, 0.75)
        assert got.dtype == (F64 if dtype == F64 else F32) and got.shape == (N,)
        ours.append(got.double() - exact)
        theirs.append(eager(*(m.to(got.dtype) for m in t), 0.75).double() - exact)
        floor.append(4 * ulp(exact, F32) if dtype != F64 else 1e-13 * exact)
    ours, theirs, floor = map(torch.cat, (ours, theirs, floor))
    for size_of in (lambda e: e.square().mean().sqrt(), lambda e: e.abs().max()):
        assert size_of(ours) <= max(FACTOR * size_of(theirs), size_of(floor))


def test_any_layout():
    weight, A, B = operands(9, 20, 4)
    expected = norm(weight, A, B, 2.0)
    wide = torch.full((9, 25), float("nan"))
    wide[:, :20] = weight
    for w in (wide[:, :20], weight.t().contiguous().t()):
        for a, b in ((A.t().contiguous().t(), B.t().contiguous().t()), (A.repeat_interleave(2, 0)[::2], B)):
            torch.testing.assert_close(norm(w, a, b, 2.0), expected)


@pytest.mark.parametrize("N, K, R", [(0, 4, 2), (3, 0, 2), (3, 4, 0), (0, 0, 0)])
def test_nothing_to_add(N, K, R):
    t = operands(N, K, R)
    torch.testing.assert_close(norm(*t, 1.0), eager(*t, 1.0) if K else torch.zeros(N))


def test_rows_go_in_parts(monkeypatch):
    """None is left out or taken twice by the reference, however little scratch there is."""
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")
    t = operands(23, 17, 3)
    expected = eager(*(m.double() for m in t), -1.5)
    for scratch in (1, 17, 40, 17 * 22):
        monkeypatch.setattr(op, "SCRATCH", scratch)
        torch.testing.assert_close(norm(*t, -1.5).double(), expected, rtol=1e-6, atol=0)


def test_opcheck_and_compile():
    t = operands(6, 10, 2, BF16)
    torch.library.opcheck(torch.ops.peftkern.lora_row_norm.default, ([t[0]], "dense", *t[1:], 0.5))
    compiled = torch.compile(lambda *a: 1 / norm(*a, 0.5), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*t), 1 / norm(*t, 0.5))


BAD = {
    "weight is 1-D": (dict(weight=torch.randn(6)), ValueError, "weight"),
    "weight is integer": (dict(weight=torch.ones(6, 10, dtype=torch.int64)), TypeError, "weight"),
    "lora_A has other K": (dict(lora_A=torch.randn(2, 9)), ValueError, "lora_A"),
    "lora_A is 1-D": (dict(lora_A=torch.randn(10)), ValueError, "lora_A"),
    "lora_A is fp64": (dict(lora_A=torch.randn(2, 10).double()), TypeError, "lora_A"),
    "lora_B has other N": (dict(lora_B=torch.randn(5, 2)), ValueError, "lora_B"),
    "lora_B has other R": (dict(lora_B=torch.randn(6, 3)), ValueError, "lora_B"),
    "lora_B is half": (dict(lora_B=torch.randn(6, 2).half()), TypeError, "lora_B"),
    "lora_A is elsewhere": (dict(lora_A=torch.empty(2, 10, device="meta")), ValueError, "lora_A is on meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, match = BAD[case]
    arguments = dict(zip(("weight", "lora_A", "lora_B"), operands(6, 10, 2), strict=True)) | changes
    with pytest.raises(error, match=match):
        norm(*arguments.values(), 1.0)

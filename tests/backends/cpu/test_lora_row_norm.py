"""lora_row_norm's native call: against the fp64 oracle, any layout, guarded memory, bits that depend on a row alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from peftkern.backends.cpu import call
from peftkern.testing.accuracy import check
from peftkern.testing.norm_problems import LAYOUTS, RowNormProblem, random_norm_problem
from peftkern.testing.problems import laid_out

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]


@pytest.fixture(autouse=True)
def cpu_backend(monkeypatch):
    """The native call or an error."""
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpu")


def assert_accurate(problem: RowNormProblem) -> None:
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


def operands(N: int, K: int, R: int, dtype=F32, adapter=F32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N, K).to(dtype), torch.randn(R, K).to(adapter), torch.randn(N, R).to(adapter)


def norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float = 0.5, threads: int = 1) -> Tensor:
    result = call.row_norm(threads, "dense", weight, A, B, scaling)
    assert result.dtype == F32 and result.shape == weight.shape[:1]
    return result


def expected(weight: Tensor, A: Tensor, B: Tensor, scaling: float = 0.5) -> Tensor:
    return (weight.double() + scaling * (B.double() @ A.double())).norm(dim=1)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("cancel", [False, True])
def test_accuracy_of_random_problems(level, dtype, cancel):
    for seed in range(8):
        assert_accurate(random_norm_problem(700 + seed, dtype, cancel=cancel, max_KN=600, max_R=80))


@pytest.mark.parametrize("dtype, adapter", PAIRS, ids=str)
def test_ragged_shapes(level, dtype, adapter):
    """Ends of blocks of rows and of vectors; more ranks than a chain of products takes, and than there are columns."""
    for N, K, R in ((1, 1, 1), (3, 17, 2), (49, 257, 5), (50, 31, 70), (7, 1000, 16)):
        for zero in (False, True):
            assert_accurate(RowNormProblem(3, N, K, R, dtype, adapter, scaling=-1.5, zero_weight=zero))
        assert_accurate(RowNormProblem(4, N, K, R, dtype, adapter, b_scale=0.0))


@pytest.mark.parametrize("N, K, R", [(0, 4, 2), (3, 0, 2), (3, 4, 0), (0, 0, 0), (60, 300, 0)])
def test_nothing_to_add(level, exports, N, K, R):
    for dtype, adapter in PAIRS:
        t = operands(N, K, R, dtype, adapter)
        torch.testing.assert_close(norm(*t).double(), expected(*t), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_layouts_do_not_change_bits(level, dtype):
    weight, A, B = operands(101, 530, 11, dtype)
    plain = norm(weight, A, B)
    for w, a in itertools.product(LAYOUTS, LAYOUTS):
        assert torch.equal(norm(laid_out(weight, w), laid_out(A, a), laid_out(B, a)), plain)
    # Adjacent along neither dimension; all rows are one.
    assert torch.equal(norm(laid_out(weight, "row_stride").repeat_interleave(2, 1)[:, :1060:2], A, B), plain)
    same = norm(weight[:1].expand(50, 530), A, B[:1].expand(50, 11))
    assert torch.equal(same, plain[:1].expand(50))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_bits_of_a_row_depend_on_nothing_else(level, dtype):
    """Not on the other rows, their number, the row's place, or the number of threads."""
    weight, A, B = operands(200, 999, 18, dtype)
    whole = norm(weight, A, B)
    for first, last in ((0, 1), (3, 5), (3, 6), (7, 14), (47, 97), (1, 200)):
        assert torch.equal(norm(weight[first:last], A, B[first:last]), whole[first:last])
    for threads in (2, 3, 64):
        assert torch.equal(norm(weight, A, B, threads=threads), whole)


def test_results_and_operands_end_where_they_end(level, guarded_results):
    """What lies behind a row, NaN here, is not read; nothing but the result is written."""
    for N, K, R in ((1, 1, 1), (53, 270, 6), (5, 33, 17)):
        weight, A, B = (laid_out(t, "row_stride") for t in operands(N, K, R))
        torch.testing.assert_close(norm(weight, A, B).double(), expected(weight, A, B), rtol=1e-6, atol=0)
    assert guarded_results.check() == 3


def test_scratch_of_another_call_does_not_leak_in(level):
    t = operands(40, 70, 6, BF16)
    before = norm(*t)
    norm(*(torch.full_like(m, math.nan) for m in operands(90, 300, 30, BF16)))
    assert torch.equal(norm(*t), before)


def test_what_is_not_finite_stays_in_its_row(level):
    weight, A, B = operands(9, 21, 3)
    plain = norm(weight, A, B)
    weight[2, 20], B[4, 1], B[7, 0] = math.inf, math.inf, math.nan
    got = norm(weight, A, B)
    assert got[2] == math.inf and got[4] == math.inf and got[7].isnan()
    others = [0, 1, 3, 5, 6, 8]
    assert torch.equal(got[others], plain[others])


def test_calls_that_are_not_ordinary():
    weight, A, B = operands(6, 10, 2)

    class Own(torch.Tensor):
        pass

    for bad in (
        (0, weight, A, B, 1.0), (1, weight, A, B, "1"), (1, weight, A, B), (1, None, A, B, 1.0), (1, weight, None, B, 1.0),
        (1, weight[0], A, B, 1.0), (1, weight, A[:, 1:], B, 1.0), (1, weight, A[:1], B, 1.0), (1, weight, A, B[1:], 1.0),
        (1, weight.double(), A, B, 1.0), (1, weight, A.half(), B, 1.0), (1, weight, A.half(), B.half(), 1.0),
        (1, weight.as_subclass(Own), A, B, 1.0), (1, torch._neg_view(weight), A, B, 1.0),
    ):  # fmt: skip
        assert call.row_norm(bad[0], "dense", *bad[1:]) is None
    assert call.row_norm(1, "dance", weight, A, B, 1.0) is None
    # The op takes what only means a plain tensor.
    got = torch.ops.peftkern.lora_row_norm([torch._neg_view(weight)], "dense", A, B, 1.0)
    assert torch.equal(got, norm(-weight, A, B, 1.0))

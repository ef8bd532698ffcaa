"""block_rotate's native calls: against the fp64 oracle, guarded memory, bits that depend on a row and on sizes alone."""

from __future__ import annotations

import math

import pytest
import torch

from peftkern.backends.cpu import call
from peftkern.dispatch.choose import Declined
from peftkern.testing.accuracy import check
from peftkern.testing.problems import laid_out
from peftkern.testing.rotate_problems import LAYOUTS, BlockRotateProblem, random_rotate_problem

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def cpu_backend(monkeypatch):
    """The native call or an error."""
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpu")


def assert_accurate(problem):
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


def operands(M, blocks, size, dtype=F32):
    x, dy = (torch.randn(M, blocks * size).to(dtype) for _ in range(2))
    return x, torch.randn(blocks, size, size), dy, torch.randperm(blocks * size)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_accuracy_of_random_problems(level, dtype):
    for seed in range(10):
        assert_accurate(random_rotate_problem(300 + seed, dtype))


@pytest.mark.parametrize("dtype, matrix", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)], ids=str)
def test_ragged_shapes(level, dtype, matrix):
    """Ends of tiles, of vectors and of segments of rows; blocks that fill a tile, and more rows than one chain of sums takes."""
    for M, blocks, size in ((1, 1, 1), (25, 5, 17), (50, 3, 100), (3, 2, 256), (49, 9, 32), (700, 3, 5), (4, 300, 2)):
        for permuted in (False, True):
            assert_accurate(BlockRotateProblem(3, M, blocks, size, dtype, matrix, permuted, permuted))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("size", [8, 32])
def test_layouts_and_threads_do_not_change_bits(level, dtype, size):
    x, R, dy, index = operands(530, 20, size, dtype)
    for at in (None, index):
        y, dR = call.block_rotate(1, x, R, at), call.block_rotate_grad(1, x, dy, size, at)
        for layout in LAYOUTS:
            for threads in (1, 3, 64):
                other = laid_out(x, layout)
                assert torch.equal(call.block_rotate(threads, other, R, at), y)
                assert torch.equal(call.block_rotate_grad(threads, other, laid_out(dy, layout), size, at), dR)
        assert torch.equal(call.block_rotate(1, x, R.transpose(1, 2).contiguous().transpose(1, 2), at), y)
        for first, last in ((0, 1), (5, 12), (23, 50)):
            assert torch.equal(call.block_rotate(1, x[first:last], R, at), y[first:last])


def test_operands_end_where_they_end(level, guarded_results):
    """What lies behind a row, NaN here, is not read; nothing but the results is written."""
    for M, blocks, size in ((1, 1, 1), (53, 7, 5), (26, 2, 33), (30, 9, 16)):
        x, R, dy, index = operands(M, blocks, size)
        x, dy = laid_out(x, "row_stride"), laid_out(dy, "row_stride")
        for at in (None, index):
            assert call.block_rotate(2, x, R, at).isfinite().all()
            assert call.block_rotate_grad(2, x, dy, size, at).isfinite().all()
    assert guarded_results.check() == 16


def test_what_is_not_finite_stays_in_its_block(level):
    x, R, dy, _ = operands(30, 5, 6)
    y, dR = call.block_rotate(1, x, R, None), call.block_rotate_grad(1, x, dy, 6, None)
    x[4, 13] = math.nan
    got = call.block_rotate(1, x, R, None)
    assert got[4, 12:18].isnan().all()
    got[4, 12:18] = y[4, 12:18]
    assert torch.equal(got, y)
    got = call.block_rotate_grad(1, x, dy, 6, None)
    assert got[2, 1].isnan().all()
    got[2, 1] = dR[2, 1]
    assert torch.equal(got, dR)


def test_larger_blocks_are_declined():
    with pytest.raises(Declined, match="at most 256 columns, not 257"):
        torch.ops.peftkern.block_rotate_fwd(torch.randn(2, 257), torch.randn(1, 257, 257))
    with pytest.raises(Declined, match="at most 256 columns"):
        torch.ops.peftkern.block_rotate_bwd(torch.randn(2, 257), torch.randn(2, 257), 257)


def test_calls_that_are_not_ordinary():
    x, R, dy, index = operands(3, 3, 4)
    for bad in (
        (0, x, R, None), (1, x, R), (1, x[0], R, None), (1, x, R[0], None), (1, x, R[:2], None), (1, x, R[:, 1:], None),
        (1, x, R.half(), None), (1, x.double(), R, None), (1, x, R, index[1:]), (1, x, R, index.int()),
        (1, x, torch.randn(1, 12, 12)[:, :0, :0], None), (1, torch._neg_view(x), R, None),
    ):  # fmt: skip
        assert call.block_rotate(*bad) is None
    for bad in ((1, x, dy[1:], 4, None), (1, x, dy.half(), 4, None), (1, x, dy, 5, None), (1, x, dy, 0, None)):
        assert call.block_rotate_grad(*bad) is None
    for entry, t in ((call.block_rotate, (x, R)), (call.block_rotate_grad, (x, dy, 4))):
        for wrong in (12, -1):
            with pytest.raises(IndexError, match="within 0 to 11"):
                entry(1, *t, torch.where(index == 3, wrong, index))
    assert torch.equal(torch.ops.peftkern.block_rotate_fwd(torch._neg_view(x), R), call.block_rotate(1, -x, R, None))

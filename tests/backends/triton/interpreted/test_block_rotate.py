"""block_rotate against fp64: blocks larger and smaller than a tile, any order of columns; a row's bits are its own."""

from __future__ import annotations

import pytest
import torch

from peftkern.kernels import configs
from peftkern.kernels.configs import LaunchConfig
from peftkern.settings import using
from peftkern.testing.accuracy import check
from peftkern.testing.rotate_problems import BlockRotateProblem, random_rotate_problem

F16, F32 = torch.float16, torch.float32
fwd, bwd = torch.ops.peftkern.block_rotate_fwd, torch.ops.peftkern.block_rotate_bwd


def assert_accurate(problem):
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_accuracy_of_random_problems(dtype):
    for seed in range(6):
        assert_accurate(random_rotate_problem(300 + seed, dtype, max_M=96, max_KN=160, max_R=80))


@pytest.mark.parametrize("dtype, matrix", [(F32, F32), (F16, F32), (F16, F16)])
@pytest.mark.parametrize("M, blocks, size", [(1, 1, 1), (70, 9, 4), (300, 2, 33), (5, 2, 70), (20, 3, 32)])
def test_units_tiles_and_ranges(M, blocks, size, dtype, matrix):
    for permuted in (False, True):
        assert_accurate(BlockRotateProblem(5, M, blocks, size, dtype, matrix, not permuted, permuted))


@pytest.mark.parametrize("M, K", [(0, 8), (3, 0), (0, 0)])
def test_nothing_to_add(M, K):
    x = torch.randn(M, K)
    assert fwd(x, torch.randn(1, 4, 4)).shape == (M, K)
    assert torch.equal(bwd(x, x, 4), torch.zeros(K // 4, 4, 4))


def test_a_row_does_not_depend_on_the_others():
    x, R = torch.randn(70, 60).half(), torch.randn(3, 20, 20)
    whole = fwd(x, R)
    for rows in (1, 5, 64, 67):
        assert torch.equal(fwd(x[:rows], R), whole[:rows])
    assert torch.equal(fwd(x.repeat_interleave(2, 1)[:, ::2], R), whole)


def test_columns_that_are_not_there_are_left_alone():
    # Nobody can look at an index on a GPU without waiting for it.
    x, index = torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 4, 5, 6, 2**40])
    y = fwd(x, torch.eye(4).expand(2, 4, 4).contiguous(), index)
    assert torch.equal(y[:, :7], x[:, :7])
    assert torch.equal(bwd(x, x, 4, index)[1, 3], torch.zeros(4))


def test_any_configuration():
    x, R, dy = torch.randn(150, 90), torch.randn(2, 45, 45), torch.randn(150, 90)
    expected = fwd(x, R), bwd(x, dy, 45)
    for config in (LaunchConfig(16, 16), LaunchConfig(32, 64, warps=8)):
        with using(triton_fixed=configs.fixed(block_rotate=config)):
            torch.testing.assert_close((fwd(x, R), bwd(x, dy, 45)), expected)
    with (
        using(triton_fixed=configs.fixed(block_rotate=LaunchConfig(48, 64))),
        pytest.raises(ValueError, match="block_rotate"),
    ):
        fwd(x, R)

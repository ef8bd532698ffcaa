"""Row norms against fp64: chunks of ranks, strips of columns, any layout; a row's bits depend on that row alone."""

from __future__ import annotations

import math

import pytest
import torch

from peftkern.kernels import configs
from peftkern.kernels.configs import LaunchConfig
from peftkern.settings import using
from peftkern.testing.accuracy import check
from peftkern.testing.norm_problems import LAYOUTS, RowNormProblem, random_norm_problem
from peftkern.testing.problems import laid_out

F16, F32 = torch.float16, torch.float32
PAIRS = [(F32, F32), (F16, F32), (F16, F16)]


def norm(weight, A, B, scaling=0.5):
    return torch.ops.peftkern.lora_row_norm([weight], "dense", A, B, scaling)


def operands(N, K, R, dtype=F32, adapter=F32):
    g = torch.Generator().manual_seed(N + K + R)
    shapes = ((N, K, dtype), (R, K, adapter), (N, R, adapter))
    return tuple(torch.randn(*shape, generator=g).to(kind) for *shape, kind in shapes)


def assert_accurate(problem):
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("cancel", [False, True])
def test_accuracy_of_random_problems(dtype, cancel):
    for seed in range(5):
        assert_accurate(random_norm_problem(700 + seed, dtype, cancel=cancel, max_KN=150, max_R=40))


@pytest.mark.parametrize("dtype, adapter", PAIRS, ids=str)
@pytest.mark.parametrize("N, K, R", [(1, 1, 1), (70, 1100, 16), (3, 40, 70)])
def test_tiles_strips_and_chunks(N, K, R, dtype, adapter):
    """More than one of each, whole or not; W, or the branch alone."""
    for zero in (False, True):
        assert_accurate(RowNormProblem(5, N, K, R, dtype, adapter, scaling=-1.5, zero_weight=zero))


def test_fp32_adapters_under_tf32(monkeypatch):
    """Two terms of each operand: at least twice the precision that is asked for."""
    t = operands(40, 60, 20, F16)
    t[0].zero_()
    exact = norm(*t)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    error = ((norm(*t) - exact).abs() / exact).max()
    assert 0 < error < 2.0**-15


@pytest.mark.parametrize("N, K, R", [(0, 4, 2), (3, 0, 2), (3, 40, 0), (0, 0, 0)])
def test_nothing_to_add(N, K, R):
    t = operands(N, K, R)
    torch.testing.assert_close(norm(*t), (t[0] + 0.5 * (t[2] @ t[1])).norm(dim=1) if K else torch.zeros(N))


def test_layouts_do_not_change_bits():
    weight, A, B = operands(70, 90, 20, F16)
    plain = norm(weight, A, B)
    for w in LAYOUTS:
        for a in LAYOUTS:
            assert torch.equal(norm(laid_out(weight, w), laid_out(A, a), laid_out(B, a)), plain)
    assert torch.equal(norm(weight.repeat_interleave(2, 1)[:, ::2], A, B), plain)


def test_a_row_does_not_depend_on_the_others():
    weight, A, B = operands(70, 600, 20, F16)
    whole = norm(weight, A, B)
    # In their places of a tile: NumPy's product, which the interpreter takes, has its own bits in each.
    for rows in (1, 5, 64, 67):
        assert torch.equal(norm(weight[:rows], A, B[:rows]), whole[:rows])


def test_what_is_not_finite_stays_in_its_row():
    weight, A, B = operands(9, 21, 3)
    plain = norm(weight, A, B)
    weight[2, 20], B[4, 1], B[7, 0] = math.inf, math.inf, math.nan
    got = norm(weight, A, B)
    # An infinite adapter has no second term.
    assert got[2] == math.inf and not got[4].isfinite() and got[7].isnan()
    assert torch.equal(got[[0, 1, 3, 5, 6, 8]], plain[[0, 1, 3, 5, 6, 8]])


def test_any_configuration():
    t = operands(40, 90, 20)
    expected = norm(*t)
    for config in (LaunchConfig(16, 32, 0, 16), LaunchConfig(128, 128, 0, 32, warps=8)):
        with using(triton_fixed=configs.fixed(row_norm=config)):
            torch.testing.assert_close(norm(*t), expected)
    with using(triton_fixed=configs.fixed(row_norm=LaunchConfig(48, 64))), pytest.raises(ValueError, match="row_norm"):
        norm(*t)

"""bottleneck_adapter against fp64 and the reference: every activation and option, in one kernel or three, ragged sizes."""

from __future__ import annotations

import itertools

import pytest
import torch

from peftkern.activations import ACTIVATIONS
from peftkern.kernels import configs
from peftkern.kernels.configs import LaunchConfig
from peftkern.ops.bottleneck_adapter import (
    Bottleneck,
    BottleneckGrad,
    BottleneckNeeds,
    bottleneck_adapter_bwd_ref,
    bottleneck_adapter_fwd_ref,
)
from peftkern.settings import using
from peftkern.testing.accuracy import check
from peftkern.testing.bottleneck_problems import OPTIONS, BottleneckProblem, random_bottleneck_problem

F16, F32 = torch.float16, torch.float32
SEED = torch.tensor([7])
fwd, bwd = torch.ops.peftkern.bottleneck_adapter_fwd, torch.ops.peftkern.bottleneck_adapter_bwd
both = pytest.mark.parametrize("fused", [True, False])


def kernels(fused):
    """One kernel for all, or three."""
    return using(triton_fixed=configs.fixed(bottleneck_fused=fused))


def assert_accurate(problem):
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


def normal(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def forward(
    h, down, up, residual=None, *, b_down=None, b_up=None, gate=None, scale=None, f="gelu", s=1.5, p=0.0, on_input=False
):
    return Bottleneck(h, residual, down, up, b_down, b_up, gate, scale, f, s, p, on_input, SEED if p else None)


def gradient(c, dy, t, needs=BottleneckNeeds._fields):
    """The backward pass of a forward's arguments."""
    needed = [name in needs for name in BottleneckNeeds._fields]
    return BottleneckGrad(dy, c.h, t, c.down, c.up, *c[5:], c.residual is None, needed)


def assert_same(ours, reference):
    for a, b in zip(ours, reference, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@both
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_accuracy_of_random_problems(dtype, fused):
    with kernels(fused):
        for seed in range(5):
            assert_accurate(random_bottleneck_problem(300 + seed, dtype, max_M=96, max_KN=160, max_R=60))


@both
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_every_option(activation, fused):
    adapter, on = (F32, "input") if fused else (F16, "output")
    problem = BottleneckProblem(
        3, 70, 40, 33, 20, F16, adapter, activation, dropout_p=0.5, dropout_on=on, options=tuple(OPTIONS)
    )
    with kernels(fused):
        assert_accurate(problem)


@pytest.mark.parametrize("dtype, adapter, R", [(F32, F32, 70), (F16, F32, 130), (F16, F16, 70)])
def test_a_rank_that_no_tile_holds(dtype, adapter, R):
    problem = BottleneckProblem(
        1, 20, 50, 70, R, dtype, adapter, "silu", 2.0, 0.25, options=("down_bias", "up_bias", "gate", "residual")
    )
    assert_accurate(problem)


@both
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_slopes(name, fused):
    """Of t itself: D and U are 1, the residual is 0."""
    t = torch.cat([normal(300) * torch.logspace(-6, 1.3, 300), torch.tensor([0.0, -0.0, 100.0, -100.0])])[:, None]
    one, zero = torch.ones(1, 1), torch.zeros_like(t)
    with kernels(fused):
        c = forward(t, one, one, zero, f=name, s=1.0)
        y, kept = fwd(*c)
        dh = bwd(*gradient(c, torch.ones_like(t), kept, ("h",)))[0]
    assert torch.equal(kept, t)
    f = ACTIVATIONS[name]
    for ours, function in ((y, f.value), (dh, f.slope)):
        exact, torchs = function(t.double()), function(t)
        bound = 4 * torch.finfo(F32).eps * exact.abs() + 1.5 * (torchs - exact).abs().max()
        assert ((ours - exact).abs() <= bound).all()
    if name == "tanh":  # each value, not the largest error
        torch.testing.assert_close(y, torch.tanh(t.double()).float(), rtol=5e-7, atol=0)
    broken = fwd(*forward(torch.full((1, 1), float("nan")), one, one, zero[:1], f=name))[0]
    assert broken.isnan().all()


M, K, N, R = 21, 40, 33, 5
H, RES, DOWN, UP, DY = normal(M, K), normal(M, N), normal(R, K), normal(N, R), normal(M, N, seed=1)
ALL = dict(b_down=normal(R), b_up=normal(N, seed=2), gate=normal(M), scale=normal(N, seed=3))


@both
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7])
def test_subsets_of_gradients(count, fused):
    c = forward(H, DOWN, UP, RES, **ALL, p=0.25)
    t = bottleneck_adapter_fwd_ref(c)[1]
    for names in itertools.combinations(BottleneckNeeds._fields, count):
        given = gradient(c, DY, t, names)
        with kernels(fused):
            assert_same(bwd(*given), bottleneck_adapter_bwd_ref(given))


@both
@pytest.mark.parametrize("absent", [(), ("gate",), ("b_up",), ("scale",), ("gate", "scale"), tuple(ALL)])
def test_options_and_strides(absent, fused):
    options = {name: value for name, value in ALL.items() if name not in absent}
    h, wide = normal(M, 2 * K)[:, :K], normal(2, M, N).transpose(0, 1)[:, 1]
    for c, dy in ((forward(h, DOWN.t().contiguous().t(), UP, wide, **options), wide),
                  (forward(h, DOWN, normal(R, K).t(), **options | {k: normal(K) for k in ("b_up", "scale") if k in options}),
                   normal(M, 2 * K, seed=5)[:, ::2])):  # fmt: skip
        with kernels(fused):
            y, t = fwd(*c)
            grads = bwd(*gradient(c, dy, t))
        assert_same((y, t), bottleneck_adapter_fwd_ref(c))
        assert_same(grads, bottleneck_adapter_bwd_ref(gradient(c, dy, t)))


@both
@pytest.mark.parametrize("m, k, n, r", [(0, 5, 7, 3), (3, 0, 7, 2), (3, 5, 0, 2), (3, 5, 7, 0), (1, 1, 1, 1)])
def test_empty_sizes(m, k, n, r, fused):
    options = dict(b_down=normal(r), b_up=normal(n), gate=normal(m), scale=normal(n))
    c = forward(normal(m, k), normal(r, k), normal(n, r), normal(m, n), **options, f="sigmoid", p=0.5)
    with kernels(fused):
        y, t = fwd(*c)
        given = gradient(c, normal(m, n), t)
        grads = bwd(*given)
    assert_same((y, t), bottleneck_adapter_fwd_ref(c))
    assert_same(grads, bottleneck_adapter_bwd_ref(given))


@pytest.mark.parametrize("dtype, adapter", [(F16, F32), (F16, F16), (F32, F32)])
def test_a_row_does_not_depend_on_the_others(dtype, adapter):
    """Nor on whether one kernel computes it or three."""
    h, dy = normal(150, 70, dtype=dtype), normal(150, 70, seed=1, dtype=dtype)
    down, up, gate = normal(20, 70, dtype=adapter), normal(70, 20, dtype=adapter), normal(150)
    found = {}
    for fused, rows in itertools.product((True, False), (150, 5, 64, 67)):
        c = forward(h[:rows], down, up, gate=gate[:rows], p=0.25)
        with kernels(fused):
            y, t = fwd(*c)
            grads = bwd(*gradient(c, dy[:rows], t, ("h", "gate")))
        found[fused, rows] = y, t, grads[0], grads[5]
    whole = found[True, 150]
    for (_, rows), results in found.items():
        assert all(torch.equal(a, b[:rows]) for a, b in zip(results, whole))


@both
def test_dropped_elements_contribute_exactly_nothing(fused):
    keep = torch.ops.peftkern.dropout_mask(SEED, M, K, 0.5)
    h, needs = torch.where(keep, H, float("nan")), ("h", "down", "up", "down_bias")
    c, clean = (forward(x, DOWN, UP, RES, p=0.5, on_input=True) for x in (h, torch.where(keep, H, 0.0)))
    with kernels(fused):
        (y, t), (expected, _) = fwd(*c), fwd(*clean)
        assert torch.equal(y, expected) and y.isfinite().all()
        ours, theirs = bwd(*gradient(c, DY, t, needs)), bwd(*gradient(clean, DY, t, needs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert torch.equal(ours[0] == 0, ~keep)


@both
def test_equal_calls_give_equal_bits(fused):
    c = forward(
        normal(200, K, dtype=F16), DOWN, normal(K, R), **ALL | dict(gate=normal(200), b_up=None, scale=None), p=0.1
    )
    with kernels(fused):
        runs = [(*fwd(*c), *bwd(*gradient(c, normal(200, K, dtype=F16), normal(200, R)))) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_any_configuration():
    c = forward(H, DOWN, UP, RES, **ALL)
    expected = fwd(*c)
    with using(triton_fixed=configs.fixed(bottleneck=LaunchConfig(16, 32, 16, 16))):
        torch.testing.assert_close(fwd(*c), expected)
    with (
        using(triton_fixed=configs.fixed(bottleneck=LaunchConfig(48, 64))),
        pytest.raises(ValueError, match="bottleneck"),
    ):
        fwd(*c)


def test_few_rows_are_shared_out():
    config = configs.bottleneck(4096, 64, 2, 90)
    assert [configs.bottleneck_fused(rows, config) for rows in (1, 2048, 8192)] == [False, False, True]

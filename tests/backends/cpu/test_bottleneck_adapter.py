"""bottleneck_adapter's native calls: against the fp64 oracle, guarded memory, bits that depend on a row and on sizes alone."""

from __future__ import annotations

import math

import pytest
import torch

from peftkern.activations import ACTIVATIONS, CODES
from peftkern.backends.cpu import call, native
from peftkern.settings import Settings, using
from peftkern.testing.accuracy import check
from peftkern.testing.bottleneck_problems import BottleneckProblem, random_bottleneck_problem
from peftkern.testing.problems import laid_out

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ALL = (1 << 7) - 1
OPTIONS = ("down_bias", "up_bias", "gate", "out_scale")


@pytest.fixture(autouse=True)
def cpu_backend(monkeypatch):
    """The native call or an error."""
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpu")


def assert_accurate(problem):
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


def arguments(M, N, R, dtype=F32, activation="gelu", p=0.0, on_input=False):
    """(what forward takes, what backward takes besides t) after the threads, all options present and h the residual."""
    h, dy = torch.randn(M, N).to(dtype), torch.randn(M, N).to(dtype)
    down, up, down_bias = torch.randn(R, N) / math.sqrt(N), torch.randn(N, R), torch.randn(R)
    seed = torch.tensor([11])
    options = (torch.randn(N), torch.randn(M), torch.randn(N), CODES[activation], 1.5, p, on_input, seed)
    return (h, None, down, up, down_bias, *options), (dy, h, down, up, *options, True, ALL)


# Under which a call is known: one for each kind of products.
NOW = {kind: Settings(cpu_kind=kind) for kind in ("panels", "bf16")}


def forward(threads, *given, kind="panels"):
    """(y, t), or None for a call that is not ordinary."""
    args = (NOW[kind], threads, *given, True)
    call.learn_bottleneck_forward(*args, kind)
    return call.bottleneck_forward(*args)


def backward(threads, t, given, kind="panels"):
    """Likewise, the gradients."""
    dy, h, *rest = given
    args = (NOW[kind], threads, dy, h, t, *rest, given[2].shape[1], given[2].shape[0], given[2].dtype)
    call.learn_bottleneck_backward(*args, kind)
    return call.bottleneck_backward(*args)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_accuracy_of_random_problems(level, dtype):
    for seed in range(10):
        assert_accurate(random_bottleneck_problem(300 + seed, dtype, max_M=300, max_KN=500, max_R=100))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ragged_shapes(level, activation):
    """Ends of tiles, of vectors and of chains of ranks, with a bias of each side and without."""
    for M, N, R in ((1, 1, 1), (25, 17, 3), (49, 270, 65), (300, 31, 16), (7, 300, 130)):
        for options in ((), ("down_bias", "up_bias"), OPTIONS):
            dropout = 0.5 if R == 65 else 0.0
            assert_accurate(BottleneckProblem(3, M, N, N, R, F32, F32, activation, dropout_p=dropout, options=options))


def test_activations_at_all_magnitudes(level):
    """Values and slopes to a few ulp, where libm's own would be: far tails, zeros, infinities, NaN."""
    grid = torch.cat(
        [torch.linspace(-15, 15, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 100.0, -100.0])]
    )
    M = grid.numel()
    one, zero = torch.ones(1, 1), torch.zeros(M, 1)
    for name, activation in ACTIVATIONS.items():
        options = (None, None, None, CODES[name], 1.0, 0.0, False, None)
        exact = grid.double()
        y, t = forward(1, grid[:, None], zero, one, one, None, *options)
        assert torch.equal(t[:, 0], grid)
        # gelu's 1 + erf and 1 - tanh^2 cancel in any arithmetic: an ulp of what cancels.
        floor = 4 * 2.0**-24 * (1 + exact.abs())
        assert ((y[:, 0].double() - activation.value(exact)).abs() <= floor).all(), name
        dh = backward(1, t, (torch.ones(M, 1), None, one, one, *options, False, 1))[0]
        assert ((dh[:, 0].double() - activation.slope(exact)).abs() <= floor).all(), name
        special = torch.tensor([math.nan, math.inf])
        y, _ = forward(1, special[:, None], zero[:2], one, one, None, *options)
        assert y[0].isnan().all()
        assert torch.equal(y[1], activation.value(special[1:])), name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("p, on_input", [(0.0, False), (0.3, False), (0.3, True)])
def test_layouts_and_threads_do_not_change_bits(level, dtype, p, on_input):
    first, second = arguments(290, 272, 37, dtype, p=p, on_input=on_input)
    y, t = forward(1, *first)
    grads = backward(1, t, second)
    for layout in ("transposed", "row_stride"):
        for threads in (1, 2, 5):
            given = [laid_out(v, layout) if isinstance(v, torch.Tensor) and v.dim() == 2 else v for v in first]
            assert all(map(torch.equal, forward(threads, *given), (y, t)))
            given = [laid_out(v, layout) if isinstance(v, torch.Tensor) and v.dim() == 2 else v for v in second]
            assert all(map(torch.equal, backward(threads, t, given), grads))


def test_bits_of_a_row_are_its_own(level):
    first, second = arguments(290, 70, 65)
    y, t = forward(2, *first)
    dh, dgate = (backward(2, t, second)[i] for i in (0, 5))
    for a, b in ((0, 1), (5, 12), (23, 50)):
        rows = [v[a:b] if isinstance(v, torch.Tensor) and v.shape[0] == 290 else v for v in first]
        assert all(map(torch.equal, forward(1, *rows), (y[a:b], t[a:b])))
        rows = [v[a:b] if isinstance(v, torch.Tensor) and v.shape[0] == 290 else v for v in second]
        done = backward(1, t[a:b], rows)
        assert torch.equal(done[0], dh[a:b])
        assert torch.equal(done[5], dgate[a:b])


def test_operands_end_where_they_end(level, guarded_results):
    """What lies behind a row, NaN here, is not read; nothing but the results is written."""
    for M, N, R in ((1, 1, 1), (53, 35, 5), (26, 66, 33)):
        first, second = arguments(M, N, R)
        first, second = (
            [laid_out(v, "row_stride") if isinstance(v, torch.Tensor) and v.dim() == 2 else v for v in given]
            for given in (first, second)
        )
        y, t = forward(2, *first)
        assert y.isfinite().all()
        assert all(grad.isfinite().all() for grad in backward(2, t, second))
    assert guarded_results.check() == 27


def test_only_what_is_needed_is_made(level):
    first, second = arguments(9, 20, 4)
    t = forward(1, *first)[1]
    every = backward(1, t, second)
    for i in range(7):
        done = backward(1, t, (*second[:-1], 1 << i))
        assert [grad is None for grad in done] == [k != i for k in range(7)]
        torch.testing.assert_close(done[i], every[i])
    assert backward(1, t, (*second[:-1], 0)) == (None,) * 7


def test_calls_that_are_not_ordinary():
    first, second = arguments(6, 8, 3)
    t = forward(1, *first)[1]

    def changed(given, i, value):
        return (*given[:i], value, *given[i + 1 :])

    h, down, up = first[0], first[2], first[3]
    wrong = [
        (0, h[0]), (0, h.double()), (0, torch._neg_view(h)), (1, h[1:]), (1, h.half()), (2, down[:, 1:]), (2, down.half()),
        (3, up[1:]), (3, None), (4, torch.randn(4)), (5, torch.randn(7)), (6, torch.randn(5)), (8, len(CODES)), (8, -1),
        (10, 1.0), (10, -0.1),
    ]  # fmt: skip
    for i, value in wrong:
        assert forward(1, *changed(first, i, value)) is None, i
    assert forward(0, *first) is None
    for i, value in (
        (0, second[0][1:]),
        (1, h[:, 1:]),
        (1, None),
        (2, down[1:]),
        (3, up.double()),
        (4, torch.randn(7)),
    ):
        assert backward(1, t, changed(second, i, value)) is None, i
    for bad in (t[1:], t.half(), t.double(), t.t().contiguous().t(), None):
        assert backward(1, bad, second) is None

"""bottleneck_adapter's native calls: against the fp64 oracle, guarded memory, bits that depend on a row and on sizes alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from peftkern.activations import ACTIVATIONS, CODES
from peftkern.backends.cpu import call
from peftkern.backends.cpu.native import _C
from peftkern.dispatch.cpu_base import PAIR_RANKS, Cpu, bottleneck_kind
from peftkern.problem import Problem
from peftkern.settings import Settings, using
from peftkern.testing.accuracy import check
from peftkern.testing.bottleneck_problems import BottleneckProblem, random_bottleneck_problem
from peftkern.testing.problems import laid_out

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

needs_pairs = pytest.mark.skipif(
    _C is None or not _C.base_gemm_bf16_usable(), reason="this CPU or build has no products of bf16"
)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ALL = (1 << 7) - 1
OPTIONS = ("down_bias", "up_bias", "gate", "out_scale")


@pytest.fixture(autouse=True)
def cpu_backend(monkeypatch):
    """The native call or an error."""
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpu")


@pytest.fixture(params=["panels", "bf16"])
def kind(request, level):
    """Of the products, at every level that has it."""
    if request.param == "bf16" and not _C.base_gemm_bf16_usable():
        pytest.skip("this level has no products of bf16")
    return request.param


def assert_accurate(problem):
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


def arguments(M, N, R, dtype=F32, activation="gelu", p=0.0, on_input=False, kind="panels"):
    """(what forward takes, what backward takes besides t) after the threads, h the residual, all options present but a gate
    where the products are bf16's."""
    h, dy = torch.randn(M, N).to(dtype), torch.randn(M, N).to(dtype)
    down, up, down_bias = torch.randn(R, N) / math.sqrt(N), torch.randn(N, R), torch.randn(R)
    gate, needs = torch.randn(M), ALL
    if kind == "bf16":
        down, up, gate, needs = down.bfloat16(), up.bfloat16(), None, ALL - 32
    options = (torch.randn(N), gate, torch.randn(N), CODES[activation], 1.5, p, on_input, torch.tensor([11]))
    return (h, None, down, up, down_bias, *options), (dy, h, down, up, *options, True, needs)


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


@needs_pairs
def test_accuracy_of_products_of_bf16():
    """The same problems with matrices in bf16 and without a gate, and ends of its blocks of rows, terms and columns."""
    for seed in range(40):
        problem = random_bottleneck_problem(700 + seed, BF16, max_M=600, max_KN=900, max_R=300)
        options = tuple(name for name in problem.options if name != "gate")
        with using(cpu_kind="bf16"):
            assert_accurate(replace(problem, adapter_dtype=BF16, options=options))
    options = ("down_bias", "up_bias", "out_scale", "residual")
    for M, K, N, R in ((1, 1, 1, 1), (129, 31, 65, 15), (128, 256, 512, 256), (385, 600, 540, 257)):
        for side in ("input", "output"):
            with using(cpu_kind="bf16"):
                assert_accurate(
                    BottleneckProblem(5, M, K, N, R, BF16, BF16, "silu", 1.5, 0.25, side, options, vector_dtype=BF16)
                )


@needs_pairs
def test_products_of_bf16_are_chosen_where_they_are_fast():
    on = Cpu("avx512", frozenset({"x86", "avx512_bf16", "bf16_kernel"}), least={PAIR_RANKS: 16})
    large = Problem("bottleneck_adapter_fwd", "cpu", "AVX512", BF16, BF16, 2048, 1024, 1024, 64, frozenset({"gelu"}))
    assert bottleneck_kind(large, on, Settings())[0] == "bf16"
    for other in (
        replace(large, R=15), replace(large, flags=frozenset({"gate"})), replace(large, adapter_dtype=F32),
        replace(large, dtype=F16, adapter_dtype=F16),
    ):  # fmt: skip
        assert bottleneck_kind(other, on, Settings())[0] == "panels"
    assert bottleneck_kind(large, on._replace(features=frozenset({"x86"})), Settings())[0] == "panels"
    assert bottleneck_kind(replace(large, M=1), on, Settings(batch_invariant=True))[0] == "bf16"
    with pytest.raises(ValueError, match="cannot be computed by"):
        forward(1, *arguments(40, 64, 8, BF16)[0], kind="bf16")  # matrices in fp32


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("p, on_input", [(0.0, False), (0.3, False), (0.3, True)])
def test_layouts_and_threads_do_not_change_bits(level, dtype, p, on_input, kind):
    if kind == "bf16" and dtype != BF16:
        pytest.skip("takes bf16 alone")
    first, second = arguments(290, 272, 37, dtype, p=p, on_input=on_input, kind=kind)
    y, t = forward(1, *first, kind=kind)
    grads = backward(1, t, second, kind)
    for layout in ("transposed", "row_stride"):
        for threads in (1, 2, 5):
            given = [laid_out(v, layout) if isinstance(v, torch.Tensor) and v.dim() == 2 else v for v in first]
            assert all(map(torch.equal, forward(threads, *given, kind=kind), (y, t)))
            given = [laid_out(v, layout) if isinstance(v, torch.Tensor) and v.dim() == 2 else v for v in second]
            assert all(
                a is b or torch.equal(a, b) for a, b in zip(backward(threads, t, given, kind), grads, strict=True)
            )


def test_bits_of_a_row_are_its_own(level, kind):
    first, second = arguments(290, 70, 65, BF16, kind=kind)
    y, t = forward(2, *first, kind=kind)
    dh, dgate = (backward(2, t, second, kind)[i] for i in (0, 5))
    for a, b in ((0, 1), (5, 12), (23, 50), (120, 270)):
        rows = [v[a:b] if isinstance(v, torch.Tensor) and v.shape[0] == 290 else v for v in first]
        assert all(map(torch.equal, forward(1, *rows, kind=kind), (y[a:b], t[a:b])))
        rows = [v[a:b] if isinstance(v, torch.Tensor) and v.shape[0] == 290 else v for v in second]
        done = backward(1, t[a:b], rows, kind)
        assert torch.equal(done[0], dh[a:b])
        assert dgate is None or torch.equal(done[5], dgate[a:b])


def test_operands_end_where_they_end(level, guarded_results, kind):
    """What lies behind a row, NaN here, is not read; nothing but the results is written."""
    for M, N, R in ((1, 1, 1), (53, 35, 5), (26, 66, 33)):
        first, second = arguments(M, N, R, F32 if kind == "panels" else BF16, kind=kind)
        first, second = (
            [laid_out(v, "row_stride") if isinstance(v, torch.Tensor) and v.dim() == 2 else v for v in given]
            for given in (first, second)
        )
        y, t = forward(2, *first, kind=kind)
        assert y.isfinite().all()
        assert all(grad.isfinite().all() for grad in backward(2, t, second, kind) if grad is not None)
    assert guarded_results.check() == (27 if kind == "panels" else 24)


def test_only_what_is_needed_is_made(level, kind):
    first, second = arguments(9, 20, 4, F32 if kind == "panels" else BF16, kind=kind)
    t = forward(1, *first, kind=kind)[1]
    every = backward(1, t, second, kind)
    for i in [i for i in range(7) if second[-1] >> i & 1]:
        done = backward(1, t, (*second[:-1], 1 << i), kind)
        assert [grad is None for grad in done] == [k != i for k in range(7)]
        torch.testing.assert_close(done[i], every[i])
    assert backward(1, t, (*second[:-1], 0), kind) == (None,) * 7


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

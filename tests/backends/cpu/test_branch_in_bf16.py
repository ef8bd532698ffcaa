"""A branch by products of bf16: accuracy, dropout in parts, bits, who is taken, and what such products cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import peftkern
from peftkern.backends.cpu import call
from peftkern.backends.cpu.native import _C
from peftkern.dispatch.choose import choose
from peftkern.dispatch.cpu_base import BRANCH_RANKS, Cpu, branch_in_bf16
from peftkern.problem import Problem
from peftkern.settings import Settings, current, using
from peftkern.testing.accuracy import check
from peftkern.testing.problems import LoRALinearProblem, laid_out, random_problem

pytestmark = [
    pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}"),
    pytest.mark.skipif(
        _C is None or not _C.base_gemm_bf16_usable(), reason="this CPU or build has no products of bf16"
    ),
]

BF16, F32 = torch.bfloat16, torch.float32
BRANCH_SCALES = ("rank_scale", "delta_in_scale", "delta_out_scale")


@pytest.fixture(autouse=True, params=["vendor", "bf16"])
def base(request, monkeypatch):
    """Every call's branch is computed by products of bf16, beside either kind of base product."""
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpu")
    with using(least=((BRANCH_RANKS, 0),), cpu_kind=request.param):
        yield request.param


def assert_accurate(problem):
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


def layer(M, K, N, R):
    """x, weight, A, B, bias, dy."""
    shapes = ((M, K), (N, K), (R, K), (N, R), (N,), (M, N))
    return [(torch.randn(shape) / shape[-1] ** 0.5).to(BF16) for shape in shapes]


def passes(x, weight, A, B, bias, dy, p=0.0, needed=("x", "A", "B", "bias")):
    """y and the gradients that are needed, None for the others."""
    leaves = dict(x=x, A=A, B=B, bias=bias)
    leaves = {name: t.detach().requires_grad_(name in needed) for name, t in leaves.items()}
    y = peftkern.lora_linear(
        leaves["x"], weight, leaves["A"], leaves["B"], bias=leaves["bias"], scaling=0.5, dropout_p=p, training=p > 0,
        seed=torch.tensor([7]) if p else None,
    )  # fmt: skip
    grads = iter(torch.autograd.grad(y, [leaves[name] for name in needed], dy))
    return [y.detach(), *(next(grads) if name in needed else None for name in leaves)]


def test_accuracy(base):
    """Random problems of both base products, empty sizes among them, and ends of blocks of rows, terms and columns."""
    small = dict(max_M=40, max_KN=120) if base == "vendor" else dict(max_M=400, max_KN=600)
    for seed in range(24):
        problem = random_problem(7300 + seed, BF16, BF16, max_R=300, **small)
        # The vendor rounds a scaled x, and its product before it is scaled, whatever the branch is: not judged here.
        left_out = BRANCH_SCALES if base == "bf16" else (*BRANCH_SCALES, "base_in_scale", "base_out_scale")
        assert_accurate(replace(problem, options=tuple(o for o in problem.options if o not in left_out)))
    for M, K, N, R in ((1, 1, 1, 1), (15, 31, 65, 33), (0, 5, 7, 3), (4, 5, 0, 3), (4, 0, 7, 3), (4, 5, 7, 0)):
        for p in (0.0, 0.25):
            assert_accurate(LoRALinearProblem(5, M, K, N, R, BF16, BF16, 1.5, p, ("bias",)))
    if base == "bf16":
        options = ("bias", "base_out_scale", "base_in_scale")
        for M, K, N, R in ((129, 257, 1100, 255), (513, 300, 129, 257), (1100, 96, 130, 70)):
            for given in ("bias",), options:
                assert_accurate(LoRALinearProblem(6, M, K, N, R, BF16, BF16, -1.5, 0.3, given))


def test_dropout_of_more_than_one_part():
    """More of x than is copied at a time: parts by rows for u and by columns for the gradient of A."""
    assert_accurate(LoRALinearProblem(8, 4300, 2100, 8, 5, BF16, BF16, 1.5, 0.5))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bits_are_those_of_sizes_alone(p, base):
    """Not of layouts or threads; of every subset of gradients, those of all; of a row of ours, not of its batch."""
    given = layer(290, 272, 330, 67)
    whole, before = passes(*given, p=p), torch.get_num_threads()
    for layout in ("transposed", "row_stride"):
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            x, weight, *others, dy = given
            other = passes(laid_out(x, layout), weight, *others, laid_out(dy, layout), p=p)
            torch.set_num_threads(before)
            # The vendor's product has bits of its own for each layout and number of threads.
            assert base == "vendor" or all(map(torch.equal, other, whole))
            assert all(map(torch.equal, other[2:4], whole[2:4]))
    for needed in (("x",), ("A",), ("B",), ("bias",), ("A", "bias"), ("x", "B")):
        part = passes(*given, p=p, needed=needed)
        assert all(a is None or torch.equal(a, b) for a, b in zip(part, whole, strict=True))
    if base == "bf16":
        x, *others, dy = given
        for rows in (1, 14, 113):
            part = passes(x[:rows], *others, dy[:rows], p=p)
            assert all(torch.equal(a, b[:rows]) for a, b in zip(part[:2], whole[:2]))


def test_chosen_where_it_is_fast():
    on = Cpu("avx512", frozenset({"x86", "avx512_bf16", "bf16_kernel"}), least={BRANCH_RANKS: 16})
    large = Problem(
        "lora_linear_fwd", "cpu", "AVX512", BF16, BF16, 2048, 1024, 1024, 64, frozenset({"bias", "p_b", "g_b"})
    )
    assert branch_in_bf16(large, on, Settings())
    for other in (
        replace(large, R=15), replace(large, adapter_dtype=F32), replace(large, dtype=F32, adapter_dtype=F32),
        replace(large, dtype=torch.float16, adapter_dtype=torch.float16), replace(large, op="multi_lora_linear_fwd"),
        *(replace(large, flags=frozenset({symbol})) for symbol in ("d", "p_d", "g_d")),
    ):  # fmt: skip
        assert not branch_in_bf16(other, on, Settings())
    assert not branch_in_bf16(large, on._replace(features=frozenset({"x86"})), Settings())
    # By ranks alone: the bits of a row are the same in any batch, and those of a gradient whatever else is wanted.
    assert branch_in_bf16(replace(large, M=1), on, Settings(batch_invariant=True))
    backward = replace(large, op="lora_linear_bwd", arch="AVX512")
    assert all(choose(replace(backward, flags=frozenset({need})), current()).way.pairs for need in ("need_x", "need_A"))


def test_what_is_not_bf16_is_refused(calls):
    for t in (calls.arguments(dtype=BF16, adapter=F32), calls.arguments(dtype=F32)):
        with pytest.raises(ValueError, match="cannot be computed by products of bf16"):
            call.learn_forward(calls, *t.values(), "panels", True)
    scales = (torch.ones(3), None, None, None, None)
    with pytest.raises(ValueError, match="cannot be computed by products of bf16"):
        call.learn_forward(calls, *calls.arguments(dtype=BF16, scales=scales).values(), "panels", True)
    assert call.learn_forward(calls, *calls.arguments(dtype=BF16).values(), "panels", True)

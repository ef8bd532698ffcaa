"""Quantised bases on CPU: every kind, product and instruction set against fp64, elements to the bit, what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_calls import backward, forward
from torch import Tensor

from peftkern import lora_linear, multi_lora_linear, settings
from peftkern.autograd.row_norm import row_norm
from peftkern.backends.cpu import call, native
from peftkern.bases.base import Base, kind_of
from peftkern.testing.accuracy import check
from peftkern.testing.bases import QUANTISED, random_base
from peftkern.testing.problems import random_problem

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("panels", "few", "bf16", "vendor")


def base_and_weight(name: str, N: int, K: int, seed: int = 0) -> tuple[Base, Tensor]:
    """A base of kind ``name``, and what its codes stand for in fp32; K is rounded up to what the kind takes."""
    base = random_base(name, N, K, torch.Generator().manual_seed(seed))
    return base, kind_of(base.kind).dequantise(base.tensors, torch.float32, (N, K))


def fitting(name: str, K: int) -> int:
    """K rounded up to what the kind takes."""
    of = QUANTISED[name][1]
    return -(-K // of) * of


def even(name: str, N: int) -> int:
    """N rounded up to what makes two halves of whole rows of kinds that share bytes between such."""
    return N + N % 2 * name.startswith(("hqq4", "quanto4"))


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("kind", ["panels", "few", "vendor"])
# Groups that straddle rows, and whole ones.
@pytest.mark.parametrize("N, K", [(37, 61), (37, 128), (38, 128), (37, 1), (1, 64)])
def test_each_element(level, name, kind, N, K):
    # The rows of an identity pick columns of W: every sum has one term, so bits are those of the definition.
    K = fitting(name, K)
    N += N * K % 2 * name.startswith(("hqq4", "quanto4"))
    base, W = base_and_weight(name, N, K)
    assert torch.equal(
        torch.cat([forward(x, base, N, kind) for x in torch.eye(K).split(5 if kind == "few" else 50)]), W.t()
    )
    assert torch.equal(torch.cat([backward(dy, base, K, kind) for dy in torch.eye(N).split(50)]), W)


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("N, K", [(37, 64), (9, 1152)])  # K is whole groups: few rows are read in pairs of terms
def test_each_element_in_bf16(level, name, N, K):
    base, W = base_and_weight(name, even(name, N), K)
    x, dy = torch.eye(K, dtype=torch.bfloat16), torch.eye(len(W), dtype=torch.bfloat16)
    for rows in (5, 8, 50):  # straight from codes, by four columns and by two, and decoded before
        assert torch.equal(torch.cat([forward(part, base, len(W), "few") for part in x.split(rows)]), W.t().bfloat16())
        assert torch.equal(torch.cat([backward(part, base, K, "few") for part in dy.split(rows)]), W.bfloat16())


# 4 bits in groups of 64, of more and of less: a line of codes at a time, or a pair of vectors; 8 bits.
FEW = (
    *("nf4", "nf4 nested", "fp4 nested", "int4 bf16", "nf4 of blocks of 32", "int4", "mxfp4", "int8", "fp8"),
    *("hqq4", "hqq4 fp16", "quanto4", "quanto4 fp16"),
)


# An odd last row; parts of a chain, and of a line.
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("N, K", [(75, 2304), (301, 1024), (21, 1088)])
def test_few_rows_of_bf16(level, name, N, K):
    N = even(name, N)
    base, W = base_and_weight(name, N, K)
    x, dy = torch.randn(23, K).bfloat16(), torch.randn(23, N).bfloat16()
    for way, a, size, w in ((forward, x, N, W.t()), (backward, dy, K, W)):
        whole, exact = way(a, base, size, "few"), a.double() @ w.double()
        for rows in (1, 2, 3, 5, 6, 7, 8, 9, 11):
            assert torch.equal(way(a[:rows], base, size, "few"), whole[:rows])
            assert torch.equal(way(a[:rows].t().contiguous().t(), base, size, "few"), whole[:rows])
        eager = (a.float() @ w.bfloat16().float()).bfloat16()
        assert (whole - exact).norm() <= 1.1 * (eager - exact).norm()


# Blocks of the product are of a part of W's columns: of one half alone, and of parts of both.
@pytest.mark.parametrize("name", ["hqq4", "quanto4 fp16", "quanto4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_halves(level, name, dtype):
    N, K = 32832, 64
    base, W = base_and_weight(name, N, K)
    x = torch.randn(native.FEW_ROWS, K, dtype=dtype)
    assert native.blocks("few", len(x), N, K, torch.get_num_threads()).cols < N // 2
    y = forward(x, base, N, "few")
    eager, exact = x.float() @ W.to(dtype).float().t(), x.double() @ W.double().t()
    assert (y - exact).norm() <= 1.1 * (eager.to(dtype) - exact).norm()
    for rows in (1, 5, 8):
        torch.testing.assert_close(forward(x[:rows], base, N, "few"), y[:rows], rtol=0, atol=0)


def test_all_codes_of_8_bits(level):
    codes = torch.arange(256, dtype=torch.uint8)[None]
    for base in (
        Base("int8", (codes.view(torch.int8), torch.ones(1))),
        *(Base("fp8", (codes.view(dtype), torch.ones(1))) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)),
    ):
        got = torch.cat([forward(x, base, 1, "panels") for x in torch.eye(256).split(1)]).t()
        W = kind_of(base.kind).dequantise(base.tensors, torch.float32, (1, 256))
        finite = W.isfinite()  # zero times what is not is NaN for all
        assert not finite.all() or base.kind == "int8"
        for i in range(256):
            alone = Base(base.kind, (base.tensors[0][:, i : i + 1].contiguous(), torch.ones(1)))
            y = forward(torch.ones(1, 1), alone, 1, "panels")
            torch.testing.assert_close(y, W[:, i : i + 1], rtol=0, atol=0, equal_nan=True)
        if base.kind == "int8":
            assert torch.equal(got, W)


@pytest.mark.parametrize(
    "kind, dtype", [("panels", torch.float32), ("few", torch.float32), ("few", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("rows", [1, 5, 50])
def test_a_scale_of_mxfp4_that_is_not_a_number(level, kind, dtype, rows):
    blocks, scales = random_base("mxfp4", 40, 512, torch.Generator().manual_seed(0)).tensors
    scales[7, 3] = 255
    base = Base("mxfp4", (blocks, scales))
    y = forward(torch.ones(rows, 512, dtype=dtype), base, 40, kind)
    assert y.isnan().all(0).nonzero().flatten().tolist() == [7] and y.isnan().sum() == rows
    dx = backward(torch.ones(rows, 40, dtype=dtype), base, 512, kind)
    assert dx.isnan().all(0).nonzero().flatten().tolist() == [*range(96, 128)] and dx.isnan().sum() == 32 * rows


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_of_random_problems(level, monkeypatch, name, kind):
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpu")
    for seed, dtype in enumerate(DTYPES):
        problem = random_problem(6000 + seed, dtype, max_M=64 if kind == "few" else 200, max_KN=400, max_R=20)
        N = problem.N + problem.N % 2 * name.startswith(("hqq4", "quanto4"))
        K = -(-problem.K // 64) * 64 if seed % 2 else fitting(name, problem.K)
        problem = dataclasses.replace(problem, base=name, N=N, K=K, zero_weight=False)
        with settings.using(cpu_kind=kind):
            bad = [row for row in check(problem) if not row.ok]
        assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


@pytest.mark.parametrize(
    "name, K",
    [
        *(("nf4 nested", 2300), ("nf4", 2304), ("int4", 2304), ("int8", 2304), ("fp8", 1280)),
        *(("hqq4", 2304), ("quanto4", 2304)),
    ],
)
@pytest.mark.parametrize("kind", ["panels", "few"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_rows_bits_do_not_depend_on_the_batch(level, name, K, kind, threads):
    N = even(name, 75)
    base, W = base_and_weight(name, N, K)
    x, dy = torch.randn(9, K), torch.randn(9, N)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for way, a, size in ((forward, x, N), (backward, dy, K)):
            whole = way(a, base, size, kind)
            for rows in (1, 3, 5):
                assert torch.equal(way(a[:rows], base, size, kind), whole[:rows])
            torch.testing.assert_close(whole, a @ (W.t() if way is forward else W), rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, K", [(70, 70016), (70016, 70)])  # more than is decoded at a time, forward and in dx
def test_the_vendors_product_in_parts(level, guarded_results, dtype, N, K):
    base, W = base_and_weight("nf4", N, K)
    x, dy = torch.randn(5, K, dtype=dtype), torch.randn(5, N, dtype=dtype)
    # Where torch exports no product, ours takes its place.
    ours = forward(x, base, N, "vendor"), backward(dy, base, K, "vendor")
    assert torch.equal(ours[0], forward(x, base, N, "panels")) and torch.equal(ours[1], backward(dy, base, K, "panels"))
    assert guarded_results.check() == 6  # and u
    call.set_up()
    expected = x.double() @ W.to(dtype).double().t(), dy.double() @ W.to(dtype).double()
    for result, exact, terms in zip((forward(x, base, N, "vendor"), backward(dy, base, K, "vendor")), expected, (K, N)):
        error = (result.double() - exact).norm() / exact.norm()
        assert error < torch.finfo(dtype).eps * (0.5 if dtype != torch.float32 else terms**0.5)


def test_parts_of_larger_tensors():
    codes, scale = torch.randint(-128, 128, (9, 40), dtype=torch.int8), torch.rand(9)
    x = torch.randn(3, 20)
    part = Base("int8", (codes[:, 11:31], scale))  # rows further apart than they are long
    expected = x.double() @ (codes[:, 11:31].double() * scale[:, None].double()).t()
    torch.testing.assert_close(forward(x, part, 9, "panels").double(), expected, rtol=1e-5, atol=1e-5)
    A, B = torch.randn(2, 20), torch.randn(9, 2)
    turned = Base("int8", (codes[:, 11:31].t().contiguous().t(), scale))  # as no kernel reads it
    torch.testing.assert_close(lora_linear(x, turned, A, B), lora_linear(x, part, A, B))


BAD = {
    "too few codes": lambda t: (t[0][:-1], t[1]),
    "no scale": lambda t: (t[0],),
    "too few scales": lambda t: (t[0], t[1][:-2]),
    "too many scales": lambda t: (t[0], torch.cat([t[1], t[1]])),
    "scales in half precision": lambda t: (t[0], t[1].half()),
    "signed codes": lambda t: (t[0].view(torch.int8), t[1]),
    "codes with gaps": lambda t: (t[0].flatten().repeat_interleave(2)[::2], t[1]),
    "not a tensor": lambda t: (t[0], 3),
    "nested without its values": lambda t: (t[0], t[1].to(torch.uint8)),
}


@pytest.mark.parametrize("case", BAD)
def test_native_entries_refuse(case):
    base, _ = base_and_weight("nf4", 24, 33)
    x, A, B = torch.randn(2, 33), torch.zeros(1, 33), torch.zeros(24, 1)

    def learn(tensors, kind="nf4", way="panels"):
        args = (object(), 1, x, kind, tensors, A, B, None, 1.0, 0.0, None, None, True, False)
        return call.learn_forward(*args, way)

    assert learn(base.tensors)
    assert not learn(BAD[case](base.tensors))
    assert not learn(base.tensors, kind="nf5")
    with pytest.raises(ValueError, match="rounded"):
        learn(base.tensors, way="int8")


@pytest.mark.parametrize("name", QUANTISED)
def test_row_norm(level, monkeypatch, name):
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpu")
    N, K = 58, fitting(name, 301)
    base, W = base_and_weight(name, N, K)
    A, B = torch.randn(5, K), torch.randn(N, 5)
    expected = (W.double() + 0.3 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(row_norm(base, A, B, 0.3).double(), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "int8", "int4"])
def test_many_adapters(monkeypatch, name, dtype):
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpu")
    N, K = 40, fitting(name, 66)
    base, _ = base_and_weight(name, N, K)
    adapters = [(torch.randn(r, K) / 8, torch.randn(N, r), 0.5) for r in (2, 7, 1)]
    ids = torch.tensor([2, -1, 0, 0, 1, 2, 1])
    x = torch.randn(7, K, dtype=dtype, requires_grad=True)
    y = multi_lora_linear(x, base, adapters, ids)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    for i, which in enumerate(ids.tolist()):
        row = x.detach()[i : i + 1].requires_grad_()
        A, B, s = adapters[which] if which >= 0 else (torch.zeros(1, K), torch.zeros(N, 1), 1.0)
        alone = lora_linear(row, base, A, B, scaling=s)
        (grad,) = torch.autograd.grad(alone, row, dy[i : i + 1])
        torch.testing.assert_close(y[i : i + 1], alone)
        torch.testing.assert_close(dx[i : i + 1], grad)

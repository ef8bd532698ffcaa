"""The many-adapter kernels against fp64: random problems, each way to store adapters, each owner of the base product."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peftkern.kernels import configs
from peftkern.kernels.configs import LaunchConfig
from peftkern.kernels.multi import tiles as multi_tiles
from peftkern.kernels.multi.configs import BASES
from peftkern.ops import adapter_table
from peftkern.ops import multi_lora_linear as op
from peftkern.ops.adapter_table import table_row
from peftkern.settings import using
from peftkern.testing.accuracy import check
from peftkern.testing.arguments import base as base_of
from peftkern.testing.multi_problems import MIXES, random_multi_problem

ops = torch.ops.peftkern
EVERY_ID = 2**31 - 1
NAN = float("nan")
SEED = torch.tensor([-0x1234_5678_9ABC_DEF1])


def test_columns_of_the_table_are_those_of_the_op():
    assert multi_tiles.COLUMNS.value == len(adapter_table.COLUMNS)
    for i, name in enumerate(adapter_table.MATRICES[:-1]):
        assert getattr(multi_tiles, name).value == i
    for symbol in adapter_table.AXES.keys() - {adapter_table.RANK_BIAS}:  # which no kernel here takes
        place = getattr(multi_tiles, symbol.upper()).value
        assert multi_tiles.VECTORS.value + 2 * place == adapter_table.vector_column(symbol)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("turn, dtype", [(0, torch.float32), (1, torch.float16), (2, torch.bfloat16)], ids=str)
def test_random_problems(base, turn, dtype):
    with using(triton_fixed=configs.fixed(multi_base=base)):
        for seed in (turn, turn + 1, turn + 2):
            number, limits = 100 * BASES.index(base) + seed, dict(max_M=60, max_KN=150, max_R=70, bottlenecks=False)
            problem = random_multi_problem(number, dtype, **limits)
            bad = [row for row in check(problem) if not row.ok]
            assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


def test_every_mix_was_among_the_random_problems():
    seen = [random_multi_problem(100 * i + s, torch.float32, max_M=60, max_R=70) for i in range(3) for s in range(5)]
    assert {p.mix for p in seen} == set(MIXES) and {p.bank for p in seen} == {p.branch for p in seen} == {True, False}
    assert any(any(p.dropout_p) for p in seen) and any(p.base_share for p in seen)


class Adapters:
    """Adapters of the given ranks, stored as ``layout`` says; slots that are not ``used`` hold NaN.

    list: contiguous A and B. pool: one tensor, A and B^T in padded rows, NaN around them. odd: gaps between rows, B in
    a tensor of A's, strides that fit no fast path.
    """

    def __init__(self, ranks, K: int, N: int, dtype: torch.dtype, layout: str, used=None):
        self.K, self.N, self.ranks, self.max_rank = K, N, ranks, max(ranks)
        self.used = list(range(len(ranks))) if used is None else list(used)
        self.scaling = torch.tensor([0.5 + 0.25 * i for i in range(len(ranks))])
        self.weights, rows = [], []
        pad = [-(-c // 16) * 16 for c in (K, N)]
        pool = torch.full((16 + sum(R * sum(pad) + 48 for R in ranks),), NAN, dtype=dtype)
        at = 16
        for slot, R in enumerate(ranks):
            value = 1.0 if slot in self.used else NAN
            A, B = torch.randn(R, K) / K**0.5 * value, torch.randn(N, R) / max(R, 1) ** 0.5 * value
            if layout == "list":
                rows.append(table_row(slot, R, 2 * slot, 0, K, 2 * slot + 1, 0, R, 1, 0))
                self.weights += [A.to(dtype), B.to(dtype)]
            elif layout == "pool":
                at_B = at + R * pad[0] + 16
                rows.append(table_row(slot, R, 0, at, pad[0], 0, at_B, 1, pad[1], 1))
                for place, width, part in ((at, pad[0], A), (at_B, pad[1], B.t())):
                    pool[place : place + R * width].view(R, width)[:, : part.shape[1]] = part
                at = at_B + R * pad[1] + 16
            else:
                row_A, row_B = K + 3, 2 * R + 1
                both = torch.full((7 + R * row_A + N * row_B,), NAN, dtype=dtype)
                rows.append(table_row(slot, R, slot, 7, row_A, slot, 7 + R * row_A, row_B, 2, 0))
                both.as_strided((R, K), (row_A, 1), 7).copy_(A)
                both.as_strided((N, R), (row_B, 2), 7 + R * row_A).copy_(B)
                self.weights.append(both)
        if layout == "pool":
            self.weights = [pool]
        self.table = torch.tensor(rows, dtype=torch.int64)

    def ids(self, M: int, base: float = 0.2) -> Tensor:
        """Random ids of used slots and -1."""
        ids = torch.tensor(self.used)[torch.randint(len(self.used), (M,))]
        return torch.where(torch.rand(M) < base, -1, ids)

    def route(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return ops.multi_lora_linear_route(ids, self.table, EVERY_ID)

    def exact(self, absolute: bool) -> list[Tensor]:
        return [w.double().abs() if absolute else w.double() for w in self.weights]


def close(got: Tensor, exact: Tensor, magnitude: Tensor, name: str) -> None:
    """Within the precision of two bf16 terms of the sum of absolute values, and a rounding of got's dtype."""
    half_ulp = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}[got.dtype]
    bound = 2.0**-15 * magnitude + 2 * half_ulp * exact.abs() + 2.0**-24
    assert got.shape == exact.shape and bool(((got.double() - exact).abs() <= bound).all()), name


PROBLEMS = (
    (1, 1, 1, (1,)),
    (5, 17, 33, (3, 1, 2)),
    (70, 64, 160, (16, 8)),
    (45, 130, 72, (13, 64, 0, 40)),
)


# Addresses, masks and terms are made by different functions, so each pair of them is met, not each triple.
@pytest.mark.parametrize("layout, drop, dtypes", [
    ("list", False, "both"), ("list", True, "both"), ("pool", False, "half"), ("pool", True, "fp32"),
    ("odd", False, "fp32"), ("odd", True, "half"),
])  # fmt: skip
def test_each_op_on_each_layout(layout, drop, dtypes):
    chosen = [d for d, word in ((torch.float32, "fp32"), (torch.float16, "half")) if dtypes in (word, "both")]
    for (M, K, N, ranks), dtype in itertools.product(PROBLEMS, chosen):
        # The last slot has no rows, and NaN in it.
        adapters = Adapters((*ranks, 3), K, N, torch.float32 if M == 45 else dtype, layout, range(len(ranks)))
        p, seed = None, None
        if drop:
            p = torch.tensor([(0.3, 0.0, 0.75)[i % 3] for i in range(len(adapters.ranks))], dtype=torch.float64)
            seed = SEED
        ids, R = adapters.ids(M), adapters.max_rank
        x, dy, bias = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype), torch.randn(N)
        route, table = adapters.route(ids), adapters.table
        W = torch.randn(N, K).to(dtype) if layout == "list" else None
        y, u, _ = ops.multi_lora_linear_fwd(
            x, *base_of(W), N, bias, adapters.weights, table, adapters.scaling, R, *route, p, seed
        )
        garbage = torch.where(torch.arange(R) < table[ids.clamp(min=0), 1][:, None], u, NAN)
        need = [layout != "list" or i % 5 != 3 for i in range(len(adapters.weights))]
        rest = *route, p, seed, True, True, need
        dx, dbias, grads, _ = ops.multi_lora_linear_bwd(
            dy, x, garbage, *base_of(W), K, adapters.weights, table, adapters.scaling, *rest
        )
        want, size = [], []
        for out, f in ((want, lambda t: t.double()), (size, lambda t: t.double().abs())):
            weights, s, exact = (
                adapters.exact(out is size),
                adapters.scaling.double(),
                base_of(None if W is None else f(W)),
            )
            out += op.multi_lora_linear_fwd_ref(
                op.MultiForward(f(x), *exact, N, f(bias), weights, table, s, R, *route, p, seed)
            )[:2]
            out += op.multi_lora_linear_bwd_ref(
                op.MultiBackward(f(dy), f(x), f(u), *exact, K, weights, table, s, *rest)
            )
        for name, got, a, b in zip(("y", "u", "dx", "dbias"), (y, u, dx, dbias), want, size):
            close(got, a, b, name)
        assert not u[ids < 0].any() and (W is not None or not dx[ids < 0].any())
        for i, (got, a, b) in enumerate(zip(grads, want[4], size[4], strict=True)):
            assert got.dtype == adapters.weights[i].dtype
            close(got, a, b, f"gradient {i}")


@pytest.mark.parametrize("slots", (3, 45), ids=("tiles-by-segment", "tiles-by-row"))
@pytest.mark.parametrize("partial, ranges", [(False, None), (True, (2, 32)), (False, (3, 16))])
def test_every_kind_of_launch(slots, partial, ranges):
    # A tile's number is a place where there are more slots than rows.
    some = random_multi_problem(8, torch.float16, max_M=90)
    problem = replace(
        some, M=40, K=290, N=150, ranks=(17, *[3] * (slots - 2), 40), branch=False, bank=False, mix="skewed",
        dropout_p=(0.3, *[0.0] * (slots - 2), 0.5), scalings=(0.7,) * slots, base_share=0.2,
        frozen=frozenset(f"{m}{i}" for i in range(1, slots - 1) for m in "AB"),
    )  # fmt: skip
    blocks = dict(multi_columns=2, multi_partial=partial)
    if ranges is not None:
        blocks |= dict(multi_ranges=ranges, multi_grad=LaunchConfig(16, 64, 0, 16))
    with using(triton_fixed=configs.fixed(**blocks)):
        bad = [row for row in check(problem) if not row.ok]
    assert not bad, "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


@pytest.mark.parametrize("empty", ("M", "K", "N", "R", "slots"))
def test_empty_sizes(empty):
    M, K, N, R = (0 if n == empty else v for n, v in zip("MKNR", (6, 5, 7, 3)))
    ranks = () if empty == "slots" else (R, R)
    weights = [t for r in ranks for t in (torch.randn(r, K), torch.randn(N, r))]
    rows = [table_row(i, r, 2 * i, 0, K, 2 * i + 1, 0, r, 1, 0) for i, r in enumerate(ranks)]
    table = torch.tensor(rows, dtype=torch.int64).reshape(len(ranks), len(adapter_table.COLUMNS))
    ids = torch.full((M,), -1) if empty == "slots" else torch.arange(M) % 3 - 1
    route = ops.multi_lora_linear_route(ids, table, EVERY_ID)
    x, W, dy, scaling = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N), torch.ones(len(ranks))
    assert_same = torch.testing.assert_close
    for weight in (W, None):
        base = base_of(weight)
        c = op.MultiForward(
            x, *base, N, torch.randn(N), weights, table, scaling, max(ranks, default=0), *route, None, None
        )
        y, u, _ = ops.multi_lora_linear_fwd(*c)
        assert_same((y, u), op.multi_lora_linear_fwd_ref(c)[:2])
        need = [True] * len(weights)
        c = op.MultiBackward(dy, x, u, *base, K, weights, table, scaling, *route, None, None, True, True, need)
        assert_same(list(ops.multi_lora_linear_bwd(*c)), list(op.multi_lora_linear_bwd_ref(c)))


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("layout", ("list", "pool"))
def test_add_in_place_leaves_other_rows_and_gaps_alone(layout, transposed):
    M, K, N = 37, 120, 101
    adapters = Adapters((4, 9, 2), K, N, torch.float16, layout, used=(0, 1))
    ids, x = adapters.ids(M), torch.randn(M, K).half()
    wide = torch.randn(N, M).half().t() if transposed else torch.randn(M, N + 5).half()
    before, out = wide.clone(), wide[:, :N]
    route = adapters.route(ids)
    ops.sgmv_add(out, x, adapters.weights, adapters.table, adapters.scaling, 9, *route)
    delta, size = (
        op.multi_lora_linear_fwd_ref(op.MultiForward(
            f(x.double()), *base_of(None), N, None, adapters.exact(i > 0), adapters.table, adapters.scaling.double(), 9,
            *route, None, None,
        ))[0]
        for i, f in enumerate((lambda t: t, torch.abs))
    )  # fmt: skip
    close(out, before[:, :N].double() + delta, size + before[:, :N].double().abs(), "out")
    assert torch.equal(out[ids == -1], before[:, :N][ids == -1]) and torch.equal(wide[:, N:], before[:, N:])


@pytest.mark.parametrize("base", BASES)
def test_rows_with_an_invalid_id_are_nan_where_nothing_can_be_raised(base):
    M, K, N = 40, 32, 48
    adapters = Adapters((4, 9), K, N, torch.float32, "list")
    good, x, W = adapters.ids(M), torch.randn(M, K), torch.randn(N, K)
    bad = torch.arange(M) % 7 == 3
    # As the route of a GPU has it: those rows last.
    place = torch.where(bad, 3, torch.where(good < 0, 2, good))
    order = place.sort(stable=True).indices.int()
    starts = torch.tensor([0, *(int((place <= i).sum()) for i in range(4))], dtype=torch.int32)
    with using(triton_fixed=configs.fixed(multi_base=base)):
        args, route, none = (adapters.weights, adapters.table, adapters.scaling), (order, starts), [False] * 4
        y, u, _ = ops.multi_lora_linear_fwd(x, *base_of(W), N, None, *args, 9, *route, None, None)
        dx, *_ = ops.multi_lora_linear_bwd(y, None, u, *base_of(W), K, *args, *route, None, None, True, False, none)
        out = torch.zeros(M, N)
        ops.sgmv_add(out, x, *args, 9, *route)
    for t in (y, dx, out):
        assert t[bad].isnan().all() and not t[~bad].isnan().any()
    assert not u[bad].any()


def test_a_tensor_that_came_later_makes_its_rows_nan():
    # A graph that was captured before a bank grew holds the addresses of then, and the table of now.
    adapters = Adapters((4, 9), 32, 48, torch.float32, "list")
    ids, x = torch.tensor([0, 1, -1, 0]), torch.randn(4, 32)
    args = adapters.weights[:2], adapters.table, adapters.scaling, 9, *adapters.route(ids), None, None
    y, u, _ = ops.multi_lora_linear_fwd(x, *base_of(None), 48, None, *args)
    assert torch.equal(y.isnan().any(1), ids == 1) and torch.equal(y.isnan().all(1), ids == 1) and not u[1].any()


def test_dropped_elements_contribute_exactly_nothing():
    M, K, N, p = 50, 72, 8, 0.4
    keep = ops.dropout_mask(SEED, M, K, p)
    adapters = Adapters((K, K), K, N, torch.float32, "list")
    for A in adapters.weights[::2]:
        A.copy_(torch.eye(K))
    ids = adapters.ids(M, 0.0)
    route, probabilities = adapters.route(ids), torch.full((2,), p, dtype=torch.float64)
    x = torch.ones(M, K).masked_fill(~keep, NAN)
    args, rest = (adapters.weights, adapters.table, torch.ones(2)), (*route, probabilities, SEED)
    _, u, _ = ops.multi_lora_linear_fwd(x, *base_of(None), N, None, *args, K, *rest)
    value = torch.where(keep, torch.tensor(1.0 / (1.0 - p)), 0.0)
    assert torch.equal(u, value)
    # du is of ones.
    for A, B in zip(adapters.weights[::2], adapters.weights[1::2], strict=True):
        A.fill_(float("inf"))
        B.zero_()[0] = 1
    dy, none = torch.zeros(M, N), [False] * 4
    dy[:, 0] = 1
    dx, *_ = ops.multi_lora_linear_bwd(dy, None, u, *base_of(None), K, *args, *rest, True, False, none)
    assert torch.equal(dx.isinf(), keep) and not dx[~keep].any()


def test_offsets_beyond_32_bits(monkeypatch):
    # Most of the tensor is never touched, so it takes no memory.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    K, N, R, at = 33, 47, 5, 2**31 + 77
    pool = torch.empty(at + R * (K + N) + 1000, dtype=torch.float16)
    A, B = torch.randn(R, K).half(), torch.randn(N, R).half()
    pool[at : at + R * K].view(R, K).copy_(A)
    pool[at + R * K : at + R * (K + N)].view(N, R).copy_(B)
    table = torch.tensor([table_row(0, R, 0, at, K, 0, at + R * K, R, 1, 0)])
    x, ids, scaling = torch.randn(3, K).half(), torch.zeros(3, dtype=torch.int64), torch.ones(1)
    route = ops.multi_lora_linear_route(ids, table, EVERY_ID)
    y, u, _ = ops.multi_lora_linear_fwd(x, *base_of(None), N, None, [pool], table, scaling, R, *route, None, None)
    torch.testing.assert_close(u, x.float() @ A.float().t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.float(), u @ B.float().t(), rtol=2e-3, atol=2e-3)
    dx, *_ = ops.multi_lora_linear_bwd(
        y, None, u, *base_of(None), K, [pool], table, scaling, *route, None, None, True, False, [False]
    )
    torch.testing.assert_close(dx.float(), y.float() @ B.float() @ A.float(), rtol=2e-3, atol=2e-2)


def test_route_of_a_bank_with_generations():
    table = torch.zeros(40, len(adapter_table.COLUMNS), dtype=torch.int64)
    table[:, 0] = torch.where(
        torch.arange(40) % 3 == 0, adapter_table.FREE, torch.arange(40) + 64 * (torch.arange(40) % 5)
    )
    taken = table[table[:, 0] >= 0, 0]
    ids = torch.cat([taken[torch.randint(len(taken), (300,))], torch.full((30,), -1)])[torch.randperm(330)]
    for t in (ids, ids.int()):
        order, starts = ops.multi_lora_linear_route(t, table, 63)
        expected = op.multi_lora_linear_route_ref(op.Route(t, table, 63))
        assert torch.equal(order, expected[0]) and torch.equal(starts, expected[1])
        assert order.dtype == starts.dtype == torch.int32
    for bad in (0, 1 + 128, -2, 41, 2**31 - 1, 2**40):
        with pytest.raises(ValueError, match=f"adapter_ids holds {bad}"):
            ops.multi_lora_linear_route(torch.tensor([-1, int(taken[0]), bad]), table, 63)

"""multi_lora_linear's C++ kernels against its reference in fp64: every level that runs here, every way to store adapters.

Magnitudes of the error bounds come from the same reference on absolute values.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from peftkern.backends.cpu import call
from peftkern.ops import adapter_table as tab
from peftkern.ops import multi_lora_linear as op
from peftkern.ops.adapter_table import table_row

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")
ops = torch.ops.peftkern

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SEED = torch.tensor([-0x1234_5678_9ABC_DEF1])
LAYOUTS = ("list", "pool", "odd")
NAN = float("nan")


class Adapters:
    """Adapters of the given ranks, stored as ``layout`` says; ``used`` holds the slots that rows may take.

    list: contiguous A and B. pool: one tensor, A and B^T in padded rows, NaN around them. odd: gaps between rows, B in
    a tensor of A's, strides that fit no fast path. Slots that are not used hold NaN.
    """

    def __init__(self, ranks, K: int, N: int, dtype: torch.dtype, layout: str, used=None):
        self.K, self.N, self.ranks = K, N, list(ranks)
        self.used = list(range(len(ranks))) if used is None else list(used)
        self.scaling = torch.tensor([0.5 + 0.25 * i for i in range(len(ranks))])
        self.weights: list[Tensor] = []
        rows = []
        pool_size, places = 0, []
        pad = [-(-c // 16) * 16 for c in (K, N)]
        for R in ranks:
            places.append((pool_size + 16, pool_size + 32 + R * pad[0]))
            pool_size += 64 + R * (pad[0] + pad[1])
        if layout == "pool":
            self.weights = [torch.full((pool_size + 1,), NAN, dtype=dtype)]
        for slot, R in enumerate(ranks):
            value = NAN if slot not in self.used else 1.0
            A, B = (torch.randn(R, K) / max(K, 1) ** 0.5 * value), (torch.randn(N, R) / max(R, 1) ** 0.5 * value)
            if layout == "list":
                rows.append(table_row(slot, R, 2 * slot, 0, K, 2 * slot + 1, 0, R, 1, 0))
                self.weights += [A.to(dtype), B.to(dtype)]
            elif layout == "pool":
                at_A, at_B = places[slot]
                rows.append(table_row(slot, R, 0, at_A, pad[0], 0, at_B, 1, pad[1], 1))
                for at, width, part in ((at_A, pad[0], A), (at_B, pad[1], B.t())):
                    stored = self.weights[0][at : at + R * width].view(R, width)
                    stored.zero_()[:, : part.shape[1]].copy_(part)
            else:
                row_A, row_B = K + 3, 2 * R + 1
                both = torch.full((7 + R * row_A + N * row_B,), NAN, dtype=dtype)
                rows.append(table_row(slot, R, slot, 7, row_A, slot, 7 + R * row_A, row_B, 2, 0))
                both.as_strided((R, K), (row_A, 1), 7).copy_(A)
                both.as_strided((N, R), (row_B, 2), 7 + R * row_A).copy_(B)
                self.weights.append(both)
        self.table = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), len(tab.COLUMNS))

    @property
    def max_rank(self) -> int:
        return max(self.ranks, default=0)

    def ids(self, M: int, base: float = 0.2) -> Tensor:
        """Random ids of used slots and -1."""
        ids = torch.tensor(self.used)[torch.randint(len(self.used), (M,))]
        return torch.where(torch.rand(M) < base, -1, ids).to(torch.int32)

    def route(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return ops.multi_lora_linear_route(ids, self.table, 2**31 - 1)

    def forward(self, x: Tensor, route, base=(), bias: Tensor | None = None, dropout=(None, None)) -> op.MultiForward:
        """The arguments of a forward pass, without a base unless one is given."""
        rows = (self.weights, self.table, self.scaling, self.max_rank)
        return op.MultiForward(x, list(base), "dense" if base else "none", self.N, bias, *rows, *route, *dropout)

    def backward(self, dy, x, u, route, base=(), dropout=(None, None), need=None, need_bias=True) -> op.MultiBackward:
        """The arguments of a backward pass that is to give dx, and gradients of all weights unless ``need`` says which."""
        need = [True] * len(self.weights) if need is None else need
        rows = (self.weights, self.table, self.scaling)
        kind = "dense" if base else "none"
        return op.MultiBackward(dy, x, u, list(base), kind, self.K, *rows, *route, *dropout, True, need_bias, need)


def doubled(c, absolute: bool = False):
    """The arguments in fp64, or their absolute values."""

    def one(value):
        if isinstance(value, list):
            return [one(v) for v in value]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.double().abs() if absolute else value.double()

    return type(c)(*map(one, c))


def close(got: Tensor, exact: Tensor, magnitude: Tensor, steps: float = 8.0, name: str = "") -> None:
    """|got - exact| within ``steps`` fp32 half-ulps of the sum of absolute values, and two roundings of got's dtype."""
    assert got.shape == exact.shape
    bound = steps * 2.0**-24 * magnitude + HALF_ULP[got.dtype] * exact.abs() + 2.0**-140
    if got.dtype == torch.float16:
        bound = bound + 2.0**-25
    error = (got.double() - exact).abs()
    assert bool((error <= bound).all()), f"{name}: error is {float((error / bound).max()):.3g} times its bound"


def make(M: int, C: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Random (M, C): contiguous, or with rows apart (NaN between), or columns apart."""
    t = torch.randn(M, C).to(dtype)
    if layout == "pool":
        return torch.nn.functional.pad(t, (0, 5), value=NAN)[:, :C]
    return t.t().contiguous().t() if layout == "odd" else t


def dropout_of(adapters: Adapters, drop: bool) -> tuple[Tensor | None, Tensor | None]:
    if not drop:
        return None, None
    return torch.tensor([(0.3, 0.0, 0.75)[i % 3] for i in range(len(adapters.ranks))], dtype=torch.float64), SEED


def kept(adapters: Adapters, ids: Tensor, p: Tensor, numpy_keep) -> Tensor:
    """bool (M, K): False where dropout drops, from the definition."""
    each = torch.where(ids >= 0, p[ids.long().clamp(min=0)], 0.0).tolist()
    seed = int(SEED) & (2**64 - 1)
    rows = [numpy_keep(seed, range(i, i + 1), range(adapters.K), q) for i, q in enumerate(each)]
    return torch.from_numpy(np.concatenate(rows)) if rows else torch.zeros(0, adapters.K, dtype=torch.bool)


# M, K, N, ranks: around the widths of vectors, register blocks, tiles and units.
PROBLEMS = (
    (1, 1, 1, (1,)),
    (5, 17, 33, (3, 1, 2)),
    (64, 256, 512, (16, 8)),
    (131, 513, 300, (13, 64, 1, 300)),
    (330, 1041, 79, (5, 17)),
    (40, 700, 1100, tuple(range(1, 21))),
    (23, 79, 523, (0, 130, 0)),
    (700, 40, 48, (4,)),
)


@pytest.mark.parametrize("drop", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(level, guarded_results, numpy_keep, dtype, layout, drop):
    results = 0
    for number, (M, K, N, ranks) in enumerate(PROBLEMS):
        adapters = Adapters(ranks, K, N, (torch.float32, dtype)[number % 2], layout)
        p, seed = dropout_of(adapters, drop)
        ids, x, bias = adapters.ids(M), make(M, K, dtype, layout), torch.randn(N) if number % 3 else None
        exact_x = x.double()
        if drop:
            keep = kept(adapters, ids, p, numpy_keep)
            exact_x = torch.where(keep, exact_x, 0.0)
            x = make(M, K, dtype, layout).copy_(torch.where(keep, x, torch.tensor(NAN, dtype=dtype)))
        c = adapters.forward(x, adapters.route(ids), bias=bias, dropout=(p, seed))
        y, u, _ = ops.multi_lora_linear_fwd(*c)
        results += 2
        c = c._replace(x=exact_x)
        want, size = (op.multi_lora_linear_fwd_ref(doubled(c, absolute)) for absolute in (False, True))
        close(u, want[1], size[1], name="u")
        close(y, want[0], size[0], 16, name="y")
    assert guarded_results.check() >= results


@pytest.mark.parametrize("drop", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(level, guarded_results, numpy_keep, dtype, layout, drop):
    for number, (M, K, N, ranks) in enumerate(PROBLEMS):
        # The last slot has no rows.
        adapters = Adapters((*ranks, 3), K, N, (torch.float32, dtype)[number % 2], layout, range(len(ranks)))
        dropout = dropout_of(adapters, drop)
        ids, x, dy = adapters.ids(M), make(M, K, dtype, layout), make(M, N, dtype, LAYOUTS[number % 3])
        need = [layout != "list" or i % 5 != 3 for i in range(len(adapters.weights))]
        c = adapters.backward(dy, x, torch.randn(M, adapters.max_rank), adapters.route(ids), dropout=dropout, need=need)
        dx, dbias, grads, _ = ops.multi_lora_linear_bwd(*c)
        want, size = (op.multi_lora_linear_bwd_ref(doubled(c, absolute)) for absolute in (False, True))
        close(dx, want[0], size[0], 16, name="dx")
        if drop:
            assert not dx[~kept(adapters, ids, dropout[0], numpy_keep)].any()
        close(dbias, want[1], size[1], name="dbias")
        for i, (got, exact, magnitude) in enumerate(zip(grads, want[2], size[2], strict=True)):
            assert got.dtype == adapters.weights[i].dtype
            if layout == "pool":  # as a whole it has NaN between the adapters
                continue
            close(got, exact, magnitude, 24, name=f"grad {i} of {(M, K, N, ranks)}")
        for slot in range(len(ranks)) if layout == "pool" else ():
            row = adapters.table[slot].tolist()
            for matrix, columns in ((op.matrix_A, K), (op.matrix_B, N)):
                close(*(matrix(g, row, columns) for g in (grads, want[2], size[2])), 24, name=f"grad of slot {slot}")
        if layout == "list":
            assert not grads[-1].any() and not grads[-2].any()
            assert grads[3].numel() == 0 if len(grads) > 3 else True
    assert guarded_results.check() >= 3 * len(PROBLEMS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", ("vendor", "panels"))
def test_base_product_is_that_of_lora_linear(level, monkeypatch, setting, dtype):
    """Rows without an adapter have exactly the bits of lora_linear without a rank; the others differ by the branch."""
    monkeypatch.setenv("PEFTKERN_CPU_BASE", setting)
    for M, K, N in ((3, 70, 90), (40, 64, 1100)):
        adapters = Adapters((3, 20), K, N, torch.float32, "list")
        x, weight, bias = torch.randn(M, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N).to(dtype)
        dy = torch.randn(M, N).to(dtype)
        none = torch.empty(0, K), torch.empty(N, 0)
        for b in (None, bias):
            rest = (*none, b, 1.0, 0.0, None, [None] * 5, False)
            base, empty_u, _ = ops.lora_linear_fwd(x, [weight], "dense", *rest)
            need = [True] + [False] * 8
            back = ops.lora_linear_bwd(
                dy, None, empty_u, None, [weight], "dense", *none, 1.0, 0.0, None, [None] * 5, need
            )[0]
            for share in (1.0, 0.5):
                ids = adapters.ids(M, share)
                route, need = adapters.route(ids), [False] * len(adapters.weights)
                y, u, _ = ops.multi_lora_linear_fwd(*adapters.forward(x, route, [weight], b))
                dx = ops.multi_lora_linear_bwd(
                    *adapters.backward(dy, None, torch.randn(M, 20), route, [weight], need=need, need_bias=False)
                )[0]
                alone = ids == -1
                assert torch.equal(y[alone], base[alone]) and torch.equal(dx[alone], back[alone])
                assert not u[alone].any()
                if share < 1.0:
                    branch, *_ = ops.multi_lora_linear_fwd(*adapters.forward(x, route))
                    exact = base.double() + branch.double()
                    size = (
                        base.double().abs() + branch.double().abs() + (2 * b.double().abs() if b is not None else 0.0)
                    )
                    assert bool(((y.double() - exact).abs() <= 4 * HALF_ULP[dtype] * size).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_row_depend_on_nothing_else(level, dtype, layout):
    """Not on the other rows, their adapters or number, the row's place, or the number of threads."""
    M, K, N = 90, 1039, 600
    adapters = Adapters((16, 5, 70, 1), K, N, dtype, layout)
    x, dy, ids = make(M, K, dtype, layout), torch.randn(M, N).to(dtype), adapters.ids(M)

    def branch(rows: Tensor) -> tuple[Tensor, ...]:
        route = adapters.route(ids[rows])
        y, u, _ = ops.multi_lora_linear_fwd(*adapters.forward(x[rows], route))
        none = [False] * len(adapters.weights)
        dx = ops.multi_lora_linear_bwd(*adapters.backward(dy[rows], None, u, route, need=none, need_bias=False))[0]
        return y, u, dx

    whole = branch(torch.arange(M))
    subsets = [torch.randperm(M)[: int(n)] for n in torch.randint(1, M + 1, (12,))]
    for slot in adapters.used:
        subsets += [(ids == slot).nonzero()[:n, 0] for n in (1, 2, 5)]
    for rows in subsets:
        assert all(torch.equal(got, want[rows]) for got, want in zip(branch(rows), whole))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(branch(torch.arange(M)), whole))


def test_add_in_place(level):
    """sgmv_add: one rounding, base-only rows untouched, any strides."""
    M, K, N = 37, 120, 301
    for dtype, transposed in itertools.product(DTYPES, (False, True)):
        adapters = Adapters((4, 9), K, N, dtype, "pool")
        ids, x = adapters.ids(M), torch.randn(M, K).to(dtype)
        out = make(M, N, dtype, "odd" if transposed else "pool")
        before = out.clone()
        c = adapters.forward(x, adapters.route(ids))
        ops.sgmv_add(out, x, c.weights, c.table, c.scaling, c.max_rank, c.order, c.starts)
        delta, size = (op.multi_lora_linear_fwd_ref(doubled(c, absolute))[0] for absolute in (False, True))
        close(out, before.double() + delta, size + before.double().abs())
        assert torch.equal(out[ids == -1], before[ids == -1])


def test_nan_in_adapters_without_rows_reaches_nothing(level):
    M, K, N = 50, 90, 130
    for layout in LAYOUTS:
        adapters = Adapters((8, 5, 40, 2), K, N, torch.bfloat16, layout, used=(0, 2))
        ids, x, dy = adapters.ids(M), torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
        route, weight = adapters.route(ids), torch.randn(N, K).bfloat16()
        y, u, _ = ops.multi_lora_linear_fwd(*adapters.forward(x, route, [weight]))
        dx, dbias, grads, _ = ops.multi_lora_linear_bwd(*adapters.backward(dy, x, u, route, [weight]))
        for t in (y, u, dx, dbias, *grads):
            assert not t.isnan().any()
        for slot in (1, 3):
            assert not op.matrix_A(grads, adapters.table[slot].tolist(), K).any()
            assert not op.matrix_B(grads, adapters.table[slot].tolist(), N).any()


def test_gradients_do_not_depend_on_threads(level):
    """Nor on whether both passes over dy are one: the sums of a wide gradient are made by columns."""
    M, K, N = 500, 300, 2100
    adapters = Adapters((6, 510), K, N, torch.float32, "list")
    x, dy, u = torch.randn(M, K), torch.randn(M, N), torch.randn(M, 510)
    route = adapters.route(adapters.ids(M))

    def run(threads: int, need: list[bool]) -> list[Tensor]:
        torch.set_num_threads(threads)
        dx, dbias, grads, _ = ops.multi_lora_linear_bwd(*adapters.backward(dy, x, u, route, need=need))
        return [dx, dbias, *grads]

    both = [run(n, [True] * 4) for n in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*both))
    assert torch.equal(run(2, [False] * 4)[0], both[0][0])
    c = adapters.backward(dy, x, u, route)
    want, size = (op.multi_lora_linear_bwd_ref(doubled(c, absolute)) for absolute in (False, True))
    for got, exact, magnitude in zip(both[0], (*want[:2], *want[2]), (*size[:2], *size[2])):
        close(got, exact, magnitude)


def test_no_rows_and_no_adapters(level):
    for M, ranks in ((0, (3,)), (4, ())):
        adapters = Adapters(ranks, 20, 30, torch.float32, "list")
        route = adapters.route(torch.full((M,), -1))
        x, weight, dy = torch.randn(M, 20), torch.randn(30, 20), torch.randn(M, 30)
        y, u, _ = ops.multi_lora_linear_fwd(*adapters.forward(x, route, [weight])._replace(max_rank=3))
        assert y.shape == (M, 30) and u.shape == (M, 3) and not u.any()
        torch.testing.assert_close(y, x @ weight.t())
        dx, dbias, grads, _ = ops.multi_lora_linear_bwd(*adapters.backward(dy, x, u, route, [weight]))
        assert torch.allclose(dbias, dy.sum(0)) and not any(g.any() for g in grads)
        torch.testing.assert_close(dx, dy @ weight)
    # No columns.
    adapters = Adapters((2,), 0, 5, torch.float32, "list")
    route = adapters.route(torch.tensor([0, -1, 0]))
    y, u, _ = ops.multi_lora_linear_fwd(*adapters.forward(torch.empty(3, 0), route, [torch.empty(5, 0)]))
    out = torch.ones(3, 5)
    c = adapters.forward(torch.empty(3, 0), route)
    ops.sgmv_add(out, c.x, c.weights, c.table, c.scaling, 2, *route)
    assert bool((out == 1.0).all())
    assert y.shape == (3, 5) and not y.any() and not u.any()


def test_offsets_beyond_32_bits(level):
    """An adapter far behind the first 2^31 elements of its tensor. The memory between is never touched."""
    K, N, R, at = 33, 47, 5, 2**31 + 77
    try:
        # Zeros of this size are mapped, not written.
        pool = torch.from_numpy(np.zeros(at + R * (K + N), dtype=np.float16))
    except MemoryError:
        pytest.skip("4 GB of addresses are not to be had")
    small = Adapters((R,), K, N, torch.float16, "list")
    table = torch.tensor([table_row(0, R, 0, at, K, 0, at + R * K, R, 1, 0)])
    pool[at : at + R * K] = small.weights[0].flatten()
    pool[at + R * K :] = small.weights[1].flatten()
    x, route = torch.randn(6, K).half(), small.route(torch.tensor([0, -1, 0, 0, 0, -1]))
    c = small.forward(x, route)
    near, far = (ops.multi_lora_linear_fwd(*each) for each in (c, c._replace(weights=[pool], table=table)))
    assert all(torch.equal(a, b) for a, b in zip(near, far))


@pytest.mark.parametrize("ids_dtype", (torch.int32, torch.int64))
def test_route(ids_dtype):
    table = torch.zeros(6, len(tab.COLUMNS), dtype=torch.int64)
    table[:, tab.ID] = torch.tensor([8, 1, tab.FREE, 19, 4, tab.FREE])
    for M in (0, 1, 7, 1000):
        ids = torch.tensor([8, 1, 19, 4, -1])[torch.randint(5, (M,))].to(ids_dtype)
        for view in (ids, torch.stack([ids, ids], 1)[:, 0], ids.view(-1, 1)):
            got, want = (
                ops.multi_lora_linear_route(view, table, 7),
                op.multi_lora_linear_route_ref(op.Route(view, table, 7)),
            )
            for a, b in zip(got, want):
                assert a.dtype == b.dtype and torch.equal(a, b)
    for bad in (0, 2, 5, 6, 7, 16, 3, -2, 2**31 - 1):
        with pytest.raises(ValueError, match=f"adapter_ids holds {bad},"):
            ops.multi_lora_linear_route(torch.tensor([1, bad, 0], dtype=ids_dtype), table, 7)
    many = torch.arange(5000).unsqueeze(1).repeat(1, len(tab.COLUMNS))
    ids = torch.tensor([4999, 17, -1, 4999, 0, 4998], dtype=ids_dtype)
    got, want = (
        ops.multi_lora_linear_route(ids, many, 8191),
        op.multi_lora_linear_route_ref(op.Route(ids, many, 8191)),
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    empty = ops.multi_lora_linear_route(torch.tensor([-1, -1], dtype=ids_dtype), table[:0], 7)
    assert [t.tolist() for t in empty] == [[0, 1], [0, 2, 2]]


def test_native_code_refuses_a_route_that_leads_astray():
    adapters = Adapters((2, 3), 8, 9, torch.float32, "list")
    order, starts = adapters.route(torch.tensor([0, 1, 0, -1, 1]))

    def run(order=order, starts=starts, table=adapters.table, rank=3, p=None, weights=adapters.weights, vectors=None):
        c = adapters.forward(torch.randn(5, 8), (order, starts), dropout=(p, SEED if p is not None else None))
        return ops.multi_lora_linear_fwd(*c._replace(table=table, max_rank=rank, weights=weights, vectors=vectors))

    def changed(t: Tensor, index, value: int) -> Tensor:
        t = t.clone()
        t[index] = value
        return t

    # A d of two elements in the first tensor of vectors.
    d = tab.vector_column("d")
    scaled = changed(adapters.table, (0, d), 0)
    run()
    run(table=scaled, vectors=[torch.ones(2)])
    bad = (
        dict(order=changed(order, 1, 5)), dict(order=changed(order, 0, -1)), dict(order=changed(order, 1, 0)),
        dict(starts=changed(starts, 1, 9)), dict(starts=changed(starts, 1, -1)), dict(starts=changed(starts, 3, 4)),
        dict(starts=changed(starts, 0, 1)), dict(starts=changed(starts, 2, 6)), dict(starts=changed(starts, 2, 2)),
        dict(starts=changed(starts, 2, 1)), dict(rank=2), dict(table=changed(adapters.table, (0, tab.RANK), -1)),
        dict(table=changed(adapters.table, (1, tab.A_TENSOR), 4)), dict(table=changed(adapters.table, (1, tab.B_OFFSET), -1)),
        dict(p=torch.tensor([0.0, 1.0], dtype=torch.float64)), dict(table=changed(adapters.table, (1, tab.A_OFFSET), 1)),
        dict(table=changed(adapters.table, (0, tab.A_ROW), 9)), dict(table=changed(adapters.table, (0, tab.A_ROW), -1)),
        dict(table=changed(adapters.table, (1, tab.B_R), 2)), dict(table=changed(adapters.table, (1, tab.B_N), 2**62)),
        dict(table=changed(adapters.table, (1, tab.B_OFFSET), 2**63 - 1)), dict(table=scaled),
        dict(table=changed(adapters.table, (0, tab.PADDED), 1)), dict(weights=[w.flatten()[:-1] for w in adapters.weights]),
        dict(table=changed(scaled, (0, d + 1), 1), vectors=[torch.ones(2)]),
        dict(table=changed(scaled, (0, d + 1), -1), vectors=[torch.ones(2)]),
        dict(table=changed(scaled, (0, d), 1), vectors=[torch.ones(2)]),
    )  # fmt: skip
    for change in bad:
        with pytest.raises(ValueError):
            run(**change)

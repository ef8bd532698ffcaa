"""The segmented branch, run on the CPU: ragged shapes, ranks, ids and layouts, against the equation in fp64."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest
import torch

MODES = [(schedule, completion) for schedule in (0, 1) for completion in (0, 1)]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# One rounding of the output, beside fp32 sums.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def raw(t: torch.Tensor) -> np.ndarray:
    """The bits of a tensor."""
    t = t.contiguous()
    return t.numpy() if t.dtype in (torch.float32, torch.int32, torch.int64) else t.view(torch.int16).numpy()


class Batch:
    """Rows with mixed adapters; ``transposed``: B lies as B^T, as in a bank."""

    def __init__(self, M, K, N, ranks, dtype, adapter_dtype, seed, transposed=False, ids=None):
        gen, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        self.M, self.K, self.N, self.max_rank, self.dtype = M, K, N, max(ranks, default=0), dtype
        self.x = torch.randn(M, K, generator=gen).to(dtype)
        self.y = torch.randn(M, N, generator=gen).to(dtype)
        # Slots lie in any order in two tensors; the row stride of A may be larger than K.
        self.pools, self.rows = [torch.empty(0, dtype=adapter_dtype)] * 2, []
        self.scaling = torch.tensor([rng.choice((1.0, -0.5, 2.0)) for _ in ranks])
        for slot, rank in enumerate(ranks):
            a_row = K + rng.choice((0, 3, 8))
            a, b = torch.randn(rank, a_row, generator=gen) / K**0.5, torch.randn(N, rank, generator=gen)
            places = []
            for which, matrix in ((0, a), (1, b.t() if transposed else b)):
                pad = torch.full((rng.choice((0, 8, 5)),), float("nan"))
                flat = torch.cat([pad, matrix.reshape(-1)]).to(adapter_dtype)
                places.append(self.pools[which].numel() + pad.numel())
                self.pools[which] = torch.cat([self.pools[which], flat])
            b_strides = (1, N) if transposed else (rank, 1)
            self.rows.append([slot, rank, 0, places[0], a_row, 1, places[1], *b_strides, 0])
        self.table = torch.tensor(self.rows, dtype=torch.int64).reshape(-1, 10)
        if ids is None:
            ids = torch.tensor([rng.randrange(-1, len(ranks)) for _ in range(M)], dtype=torch.int64)
        self.ids = ids
        place = torch.where(ids >= len(ranks), len(ranks) + 1, torch.where(ids == -1, len(ranks), ids))
        self.order = torch.sort(place, stable=True).indices.int()
        counts = torch.bincount(place, minlength=len(ranks) + 2)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()

    def expected(self) -> torch.Tensor:
        y = self.y.double()
        for t, i in enumerate(self.ids.tolist()):
            if i >= len(self.rows):
                y[t] = float("nan")
            elif i >= 0:
                _, rank, _, at_a, a_row, _, at_b, b_n, b_r, _ = self.rows[i]
                a = self.pools[0].double().as_strided((rank, self.K), (a_row, 1), at_a)
                b = self.pools[1].double().as_strided((self.N, rank), (b_n, b_r), at_b)
                y[t] += self.scaling[i].double() * (b @ (a @ self.x[t].double()))
        return y

    def run(self, sim, launches=1, **how) -> torch.Tensor:
        library = sim._library
        library.sim_sgmv_partials.restype = library.sim_sgmv_counters.restype = ctypes.c_int64
        as64 = ctypes.c_int64
        partials = library.sim_sgmv_partials(as64(self.M), as64(self.K), as64(self.max_rank))
        counters = library.sim_sgmv_counters(as64(self.M))
        sizes = np.array(
            [
                CODES[self.dtype],
                CODES[self.pools[0].dtype],
                self.N,
                self.K,
                self.M,
                self.N,
                self.K,
                len(self.rows),
                self.max_rank,
            ]
        )
        with sim.memory(at_end=how.pop("at_end", True)) as memory:
            pools = [memory.put(raw(p), alignment=16 if self.M % 2 else None) for p in self.pools]
            tensors = memory.put(np.array([p.address for p in pools], np.uint64))
            x, table, scaling, order, starts = (
                memory.put(raw(t)) for t in (self.x, self.table, self.scaling, self.order, self.starts)
            )
            count = memory.put(np.zeros(counters, np.uint32))
            partial = memory.empty(partials, np.float32)
            for _ in range(launches):
                partial.array[...] = np.nan
                out = memory.put(raw(self.y))
                sim.run(
                    "sim_sgmv_add",
                    memory.put(sizes),
                    out,
                    x,
                    tensors,
                    table,
                    scaling,
                    order,
                    starts,
                    partial,
                    count,
                    **how,
                )
                assert not count.array.any(), "the counters are not ready for the next launch"
            return torch.from_numpy(out.array.copy()).view(self.dtype)


def check(batch: Batch, got: torch.Tensor) -> None:
    expected = batch.expected()
    bad = expected.isnan()
    assert torch.equal(got.isnan(), bad)
    error = (got.double() - expected).abs()[~bad]
    size = expected.abs()[~bad] + 4
    assert (error <= ROUNDING[batch.dtype] * size).all(), (error / size).max()
    base = batch.ids == -1
    assert torch.equal(got[base], batch.y[base]), "rows without an adapter have changed"


PAIRS = [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16), (torch.float16, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("dtype, adapter_dtype", PAIRS)
@pytest.mark.parametrize(
    "M, K, N, ranks",
    [
        (1, 1, 1, (1,)),
        (7, 40, 33, (3, 16)),
        (6, 1030, 20, (8, 0, 5)),
        (13, 17, 515, (1, 40, 7)),
        (2, 2056, 9, (128,)),
    ],
)
def test_branch(sim, M, K, N, ranks, dtype, adapter_dtype):
    for transposed in (False, True):
        batch = Batch(M, K, N, ranks, dtype, adapter_dtype, seed=M + K, transposed=transposed)
        check(batch, batch.run(sim, launches=2, seed=M, at_end=not transposed))


@pytest.mark.parametrize("mode", MODES)
def test_every_schedule_gives_the_same_bits(sim, mode):
    batch = Batch(9, 1100, 530, (5, 16, 2), torch.bfloat16, torch.bfloat16, seed=3)
    expected = batch.run(sim)
    check(batch, expected)
    for seed in range(3):
        assert torch.equal(batch.run(sim, seed=seed, mode=mode, resident=seed + 1), expected)


@pytest.mark.parametrize("mode", MODES)
def test_sums_are_read_after_they_were_published(sim, mode):
    """Few blocks, all of them at work at the same time, many schedules."""
    batch = Batch(2, 24, 8, (9, 8), torch.float32, torch.float32, seed=7, ids=torch.tensor([0, 1]))
    for seed in range(24):
        check(batch, batch.run(sim, seed=seed, mode=mode, resident=4))


def test_rows_do_not_depend_on_the_batch(sim):
    """A row's bits are those it gets alone, whatever rows share its adapter or its launch."""
    batch = Batch(11, 1040, 40, (6, 16), torch.float32, torch.float32, seed=5)
    together = batch.run(sim)
    for t in (0, 4, 10):
        alone = Batch(11, 1040, 40, (6, 16), torch.float32, torch.float32, seed=5)
        ids = torch.full((11,), -1)
        ids[t] = alone.ids[t]
        alone = Batch(11, 1040, 40, (6, 16), torch.float32, torch.float32, seed=5, ids=ids)
        alone.x, alone.y, alone.pools = batch.x, batch.y, batch.pools
        assert torch.equal(alone.run(sim)[t], together[t])


def test_ids_without_an_adapter(sim):
    """-1 leaves the row alone, an id that nobody has makes it NaN."""
    ids = torch.tensor([0, 7, -1, 1, 7, -1])
    batch = Batch(6, 24, 600, (4, 2), torch.bfloat16, torch.float32, seed=1, ids=ids)
    got = batch.run(sim)
    check(batch, got)
    assert got[[1, 4]].isnan().all()

"""The segmented branch, run on the CPU: ragged shapes, ranks, ids and layouts, against the equation in fp64.

Two kernels: by tickets (any dtype and device; here arch 80) and, in half precision, by clusters (arch 90).
"""

from __future__ import annotations

import copy
import ctypes
import random

import numpy as np
import pytest
import torch

from peftkern.ops.adapter_table import COLUMNS, table_row

MODES = [(schedule, completion) for schedule in (0, 1) for completion in (0, 1)]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# One rounding of the output, beside fp32 sums.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def raw(t: torch.Tensor) -> np.ndarray:
    """The bits of a tensor."""
    t = t.contiguous()
    return t.numpy() if t.dtype in (torch.float32, torch.int32, torch.int64) else t.view(torch.int16).numpy()


class Batch:
    """Rows with mixed adapters; ``transposed``: B lies as B^T, as in a bank.

    bank: rows of A and B^T and where adapters begin are multiples of 16; otherwise they are anywhere. gap: columns
    between the rows of x and of out.
    """

    def __init__(
        self, M, K, N, ranks, dtype, adapter_dtype, seed, transposed=False, ids=None, bank=False, gap=0
    ):  # fmt: skip
        gen, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        self.M, self.K, self.N, self.max_rank, self.dtype = M, K, N, max(ranks, default=0), dtype
        self.gap, self.bank = gap, bank
        self.x = torch.randn(M, K, generator=gen).to(dtype)
        self.y = torch.randn(M, N, generator=gen).to(dtype)
        # Slots lie in any order in two tensors; the row stride of A may be larger than K.
        self.pools, self.rows = [torch.empty(0, dtype=adapter_dtype)] * 2, []
        self.scaling = torch.tensor([rng.choice((1.0, -0.5, 2.0)) for _ in ranks])
        for slot, rank in enumerate(ranks):
            a_row, b_row = (-(-K // 16) * 16, -(-N // 16) * 16) if bank else (K + rng.choice((0, 3, 8)), N)
            a, b = torch.randn(rank, a_row, generator=gen) / K**0.5, torch.randn(b_row, rank, generator=gen)
            a[:, K:], b[N:] = float("nan"), float("nan")
            places = []
            for which, matrix in ((0, a), (1, b.t() if transposed else b)):
                pad = torch.full((rng.choice((0, 16) if bank else (0, 8, 5)),), float("nan"))
                flat = torch.cat([pad, matrix.reshape(-1)]).to(adapter_dtype)
                places.append(self.pools[which].numel() + pad.numel())
                self.pools[which] = torch.cat([self.pools[which], flat])
            b_strides = (1, b_row) if transposed else (rank, 1)
            self.rows.append(table_row(slot, rank, 0, places[0], a_row, 1, places[1], *b_strides, 0))
        self.table = torch.tensor(self.rows, dtype=torch.int64).reshape(-1, len(COLUMNS))
        if ids is None:
            ids = torch.tensor([rng.randrange(-1, len(ranks)) for _ in range(M)], dtype=torch.int64)
        self.route(ids)

    def route(self, ids: torch.Tensor) -> None:
        slots = len(self.rows)
        self.ids = ids
        place = torch.where(ids >= slots, slots + 1, torch.where(ids == -1, slots, ids))
        self.order = torch.sort(place, stable=True).indices.int()
        counts = torch.bincount(place, minlength=slots + 2)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()

    def expected(self) -> torch.Tensor:
        y = self.y.double()
        for t, i in enumerate(self.ids.tolist()):
            if i >= len(self.rows):
                y[t] = float("nan")
            elif i >= 0:
                _, rank, _, at_a, a_row, _, at_b, b_n, b_r, *_ = self.rows[i]
                a = self.pools[0].double().as_strided((rank, self.K), (a_row, 1), at_a)
                b = self.pools[1].double().as_strided((self.N, rank), (b_n, b_r), at_b)
                y[t] += self.scaling[i].double() * (b @ (a @ self.x[t].double()))
        return y

    def expected_u(self) -> tuple[torch.Tensor, torch.Tensor]:
        """u and the sum of the sizes of its terms."""
        u = torch.zeros(2, self.M, self.max_rank, dtype=torch.float64)
        for t, i in enumerate(self.ids.tolist()):
            if 0 <= i < len(self.rows):
                _, rank, _, at_a, a_row, *_ = self.rows[i]
                a = self.pools[0].double().as_strided((rank, self.K), (a_row, 1), at_a)
                u[:, t, :rank] = torch.stack([a @ self.x[t].double(), a.abs() @ self.x[t].double().abs()])
        return u[0], u[1]

    def run(self, sim, arch=80, launches=1, dependent=False, **how) -> torch.Tensor:
        """``out`` after the launches; arch 90 takes the kernel for clusters, if it is for the dtype.

        That kernel makes u too, and u is checked here; of two launches the second one makes none, and the same bits.
        """
        library = sim.library
        library.sim_sgmv_partials.restype = library.sim_sgmv_counters.restype = ctypes.c_int64
        as64 = ctypes.c_int64
        kernel = as64(self.max_rank), CODES[self.dtype], arch
        partials = library.sim_sgmv_partials(as64(self.M), as64(self.K), *kernel)
        counters = library.sim_sgmv_counters(as64(self.M), *kernel)
        assert (counters == 0) == (arch >= 90 and self.dtype != torch.float32)
        sizes = [
            CODES[self.dtype], CODES[self.pools[0].dtype], self.N + self.gap, self.K + self.gap, self.M, self.N, self.K,
            len(self.rows), self.max_rank, int(dependent), arch,
        ]  # fmt: skip
        with sim.memory(at_end=how.pop("at_end", True)) as memory:
            pools = [memory.put(raw(p), alignment=16 if self.bank or self.M % 2 else None) for p in self.pools]
            tensors = memory.put(np.array([p.address for p in pools], np.uint64))
            table, scaling, order, starts = (
                memory.put(raw(t)) for t in (self.table, self.scaling, self.order, self.starts)
            )
            # The last row ends at the guard page, with a gap that nothing may touch before each other row.
            pad = torch.nn.functional.pad
            x = memory.put(raw(pad(self.x, (self.gap, 0), value=float("nan"))), 16 if self.bank else None)
            x_at = ctypes.c_void_p(x.address + self.gap * self.x.element_size())
            y = raw(pad(self.y, (self.gap, 0), value=1.0))
            count = partial = u = None
            if not counters:
                u = memory.empty((self.M, self.max_rank), np.float32)
            if counters:
                count = memory.put(np.zeros(counters, np.uint32))
                partial = memory.empty(partials, np.float32)
            results = []
            for launch in range(launches):
                if partial is not None:
                    partial.array[...] = np.nan
                out = memory.put(y, 16 if self.bank else None)
                if dependent:
                    for buffer in (out, u, partial, count):
                        if buffer is not None:
                            sim.written_before(buffer)
                at = ctypes.c_void_p(out.address + self.gap * self.y.element_size())
                sim.run(
                    "sim_sgmv_add", memory.put(np.array(sizes)), at, x_at, tensors, table, scaling, order, starts,
                    None if launch else u, partial, count, **how,
                )  # fmt: skip
                assert count is None or not count.array.any(), "the counters are not ready for the next launch"
                results.append(out.array.copy())
            assert all(np.array_equal(bits.view(np.uint8), results[0].view(np.uint8)) for bits in results)
            got = torch.from_numpy(results[0]).view(self.dtype)
            assert (got[:, : self.gap] == 1).all(), "something was written between the rows"
            if u is not None:
                expected, size = self.expected_u()
                error = (torch.from_numpy(u.array.copy()).double() - expected).abs()
                assert (error <= 1e-6 * size).all(), f"u of rows {(error > 1e-6 * size).any(1).nonzero().T.tolist()}"
            return got[:, self.gap :]


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


KERNELS = [(80, *p) for p in PAIRS] + [(90, *p) for p in PAIRS[1:]]


@pytest.mark.parametrize("arch, dtype, adapter_dtype", KERNELS)
@pytest.mark.parametrize(
    "M, K, N, ranks",
    [
        (1, 1, 1, (1,)),
        (7, 40, 33, (3, 16)),
        (6, 1032, 20, (8, 0, 5)),
        (13, 17, 515, (1, 40, 7)),
        (2, 2056, 9, (128,)),
    ],
)
def test_branch(sim, M, K, N, ranks, arch, dtype, adapter_dtype):
    for transposed in (False, True):
        gap = 0 if transposed else 8 if M == 7 else 3
        batch = Batch(M, K, N, ranks, dtype, adapter_dtype, seed=M + K, transposed=transposed, gap=gap)
        check(batch, batch.run(sim, arch, launches=2, seed=M, at_end=not transposed))


@pytest.mark.parametrize("dtype, adapter_dtype", PAIRS[1:])
@pytest.mark.parametrize(
    "M, K, N, ranks", [(5, 4096, 640, (16, 64)), (3, 264, 1024, (8,)), (40, 72, 88, (24, 4)), (3, 48, 60, (5,))]
)
def test_wide_loads(sim, M, K, N, ranks, dtype, adapter_dtype):
    """Addresses and strides as a bank has them."""
    for transposed in (True, False):
        ids = torch.arange(M) % len(ranks)
        batch = Batch(M, K, N, ranks, dtype, adapter_dtype, M, transposed, ids, bank=True, gap=8)
        check(batch, batch.run(sim, 90, seed=M, at_end=transposed))


@pytest.mark.parametrize("dtype, adapter_dtype", PAIRS[1:])
@pytest.mark.parametrize("bank", [False, True])
def test_many_rows_of_an_adapter(sim, dtype, adapter_dtype, bank):
    """Prefill: several items a segment, the last one with fewer rows, numbered by segment."""
    ids = torch.tensor([1] * 77 + [-1] * 3 + [0] * 17 + [2] * 130 + [5] * 2 + [3])[torch.randperm(230)]
    batch = Batch(230, 72, 136, (16, 40, 1, 7), dtype, adapter_dtype, seed=2, transposed=bank, ids=ids, bank=bank)
    check(batch, batch.run(sim, 90))


@pytest.mark.parametrize("dtype, adapter_dtype", PAIRS[1:])
def test_items_of_64_rows(sim, dtype, adapter_dtype):
    """From 1024 rows on: whole items and parts of one, of as many ranks as one, two and three products have."""
    ids = torch.tensor([1] * 70 + [0] * 35 + [2] * 20 + [-1] * 900 + [5] * 2)[torch.randperm(1027)]
    batch = Batch(1027, 72, 136, (16, 24, 40), dtype, adapter_dtype, seed=2, transposed=True, ids=ids, bank=True)
    got = batch.run(sim, 90)
    check(batch, got)
    # The same bits as alone, in an item of 16 rows.
    for slot in range(3):
        check_alone(sim, 90, batch, got, (ids == slot).nonzero()[-1].item())


@pytest.mark.parametrize("arch", [80, 90])
def test_rank_200(sim, arch):
    """Above 128, an item has 16 rows."""
    ids = torch.tensor([0] * 20 + [1] * 2)
    batch = Batch(22, 40, 72, (200, 130), torch.bfloat16, torch.float32, seed=9, transposed=True, ids=ids)
    check(batch, batch.run(sim, arch))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", [80, 90])
def test_every_schedule_gives_the_same_bits(sim, mode, arch):
    batch = Batch(9, 1104, 530, (5, 16, 2), torch.bfloat16, torch.bfloat16, seed=3)
    expected = batch.run(sim, arch)
    check(batch, expected)
    for seed in range(3):
        assert torch.equal(batch.run(sim, arch, seed=seed, mode=mode, resident=seed + 1), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch, dtype", [(80, torch.float32), (90, torch.bfloat16)])
def test_sums_are_read_after_they_were_published(sim, mode, arch, dtype):
    """Few blocks, all of them at work at the same time, many schedules."""
    batch = Batch(2, 24, 8, (9, 8), dtype, torch.float32, seed=7, ids=torch.tensor([0, 1]))
    for seed in range(24 if arch == 80 else 6):
        check(batch, batch.run(sim, arch, seed=seed, mode=mode, resident=4))


def check_alone(sim, arch: int, batch: Batch, got: torch.Tensor, t: int) -> None:
    alone = copy.copy(batch)
    alone.M, alone.x, alone.y = 1, batch.x[t : t + 1], batch.y[t : t + 1]
    alone.route(batch.ids[t : t + 1])
    assert torch.equal(alone.run(sim, arch), got[t : t + 1]) or got[t].isnan().any()


@pytest.mark.parametrize("arch, dtype", [(80, torch.float32), (90, torch.bfloat16), (90, torch.float16)])
@pytest.mark.parametrize("M, bank", [(11, False), (70, True)])
def test_rows_do_not_depend_on_the_batch(sim, arch, dtype, M, bank):
    """A row's bits are those it gets alone, whatever rows share its adapter or its launch."""
    batch = Batch(M, 1040, 72, (6, 20), dtype, torch.float32, seed=5, bank=bank, transposed=bank)
    together = batch.run(sim, arch)
    for t in (0, 4, M - 1):
        check_alone(sim, arch, batch, together, t)


@pytest.mark.parametrize("arch", [80, 90])
def test_ids_without_an_adapter(sim, arch):
    """-1 leaves the row alone, an id that nobody has makes it NaN."""
    ids = torch.tensor([0, 7, -1, 1, 7, -1])
    batch = Batch(6, 24, 600, (4, 2), torch.bfloat16, torch.float32, seed=1, ids=ids)
    got = batch.run(sim, arch)
    check(batch, got)
    assert got[[1, 4]].isnan().all()
    for some in (torch.full((70,), -1), torch.full((70,), 9)):
        batch = Batch(70, 24, 40, (4, 2), torch.bfloat16, torch.float32, seed=1, ids=some)
        check(batch, batch.run(sim, arch))


@pytest.mark.parametrize("arch", [80, 90])
def test_behind_a_launch_that_still_runs(sim, arch):
    """What that launch, or one before it, may use is touched after it has ended; and it has ended when this one has."""
    for seed, ids in enumerate((None, torch.tensor([-1, 3, -1, -1]), torch.full((4,), -1))):
        batch = Batch(4, 40, 80, (4, 2), torch.float16, torch.float16, seed=seed, ids=ids, transposed=True)
        check(batch, batch.run(sim, arch, seed=seed, dependent=True))

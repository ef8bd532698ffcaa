"""Batches of rows that take different adapters, in the simulator's memory, and what the equation in fp64 makes of them."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import torch

from peftkern.ops.adapter_table import AXES, BETA, COLUMNS, table_row, vector_column

PAIRS = [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16), (torch.float16, torch.float32),
]  # fmt: skip
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# One rounding of the output, beside fp32 sums.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def raw(t: torch.Tensor) -> np.ndarray:
    """The bits of a tensor."""
    t = t.contiguous()
    return t.numpy() if t.dtype in (torch.float32, torch.int32, torch.int64) else t.view(torch.int16).numpy()


class Batch:
    """Rows with mixed adapters; ``transposed``: B lies as B^T, as in a bank.

    bank: rows of A and B^T and where adapters and vectors begin are multiples of 16; otherwise they are anywhere. gap:
    columns between the rows of x and of out. ``give`` brings vectors; src and bias may be set afterwards.
    """

    def __init__(
        self, M, K, N, ranks, dtype, adapter_dtype, seed, transposed=False, ids=None, bank=False, gap=0
    ):  # fmt: skip
        gen, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        self.M, self.K, self.N, self.max_rank, self.dtype = M, K, N, max(ranks, default=0), dtype
        self.gap, self.bank, self.src, self.bias = gap, bank, None, None
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
        self.own: list[dict[str, torch.Tensor]] = [{} for _ in ranks]
        self.vectors: list[torch.Tensor] = []
        if ids is None:
            ids = torch.tensor([rng.randrange(-1, len(ranks)) for _ in range(M)], dtype=torch.int64)
        self.route(ids)

    def give(self, *symbols: str, seed: int = 0) -> Batch:
        """Vectors for the adapters, "d g_b" for the first and so on, in two tensors."""
        gen, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        sizes, self.vectors = {"K": self.K, "N": self.N}, [torch.empty(0)] * 2
        for row, own, names in zip(self.rows, self.own, symbols):
            for symbol in names.split():
                own[symbol] = torch.randn(sizes.get(AXES[symbol], row[1]), generator=gen)
                which, column = rng.randrange(2), vector_column(symbol)
                known = self.vectors[which]
                free = -known.numel() % 16 if self.bank else rng.choice((0, 5, 8))
                row[column : column + 2] = which, known.numel() + free
                self.vectors[which] = torch.cat([known, torch.full((free,), float("nan")), own[symbol]])
        return self

    @property
    def table(self) -> torch.Tensor:
        return torch.tensor(self.rows, dtype=torch.int64).reshape(-1, len(COLUMNS))

    def route(self, ids: torch.Tensor) -> None:
        slots = len(self.rows)
        self.ids = ids
        place = torch.where(ids >= slots, slots + 1, torch.where(ids == -1, slots, ids))
        self.order = torch.sort(place, stable=True).indices.int()
        counts = torch.bincount(place, minlength=slots + 2)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()

    @staticmethod
    def column(name: str) -> int:
        """Of the table: a column by name, or a vector's tensor by symbol."""
        return vector_column(name) if name in AXES else COLUMNS.index(name)

    def matrices(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in fp64."""
        _, rank, _, at_a, a_row, _, at_b, b_n, b_r, *_ = self.rows[slot]
        A = self.pools[0].double().as_strided((rank, self.K), (a_row, 1), at_a)
        return A, self.pools[1].double().as_strided((self.N, rank), (b_n, b_r), at_b)

    def vector(self, slot: int, symbol: str, other: float | torch.Tensor = 1.0) -> float | torch.Tensor:
        """In fp64; ``other`` where the adapter has none."""
        found = self.own[slot].get(symbol) if slot >= 0 else None
        return other if found is None else found.double()

    def low(self, t: int, slot: int, absolute: bool = False) -> torch.Tensor:
        """u of a row; ``absolute``: the sum of the sizes of its terms."""
        A, x = self.matrices(slot)[0], self.x[t].double() * self.vector(slot, "p_d")
        return A.abs() @ x.abs() if absolute else A @ x

    def expected(self) -> torch.Tensor:
        y = torch.full((self.M, self.N), float("nan"), dtype=torch.float64)
        base = (self.y if self.src is None else self.src).double()
        bias = torch.zeros(self.N).double() if self.bias is None else self.bias.double()
        for t, slot in enumerate(self.ids.tolist()):
            if slot < len(self.rows):
                y[t] = self.vector(slot, "g_b") * base[t] + self.vector(slot, BETA, bias)
            if 0 <= slot < len(self.rows):
                v = self.scaling[slot].double() * self.vector(slot, "d") * self.low(t, slot)
                y[t] += self.vector(slot, "g_d") * (self.matrices(slot)[1] @ v)
        return y

    def expected_u(self) -> tuple[torch.Tensor, torch.Tensor]:
        """u and the sum of the sizes of its terms."""
        u = torch.zeros(2, self.M, self.max_rank, dtype=torch.float64)
        for t, slot in enumerate(self.ids.tolist()):
            if 0 <= slot < len(self.rows):
                u[:, t, : self.rows[slot][1]] = torch.stack([self.low(t, slot), self.low(t, slot, True)])
        return u[0], u[1]

    def put(self, memory, sim, dependent: bool) -> tuple:
        """(addresses, table, scaling, order, starts), and (src, bias), in guarded memory."""
        alignment = 16 if self.bank or self.M % 2 else None
        pools = [memory.put(raw(p), alignment=alignment) for p in (*self.pools, *self.vectors)]
        parts = self.table, self.scaling, self.order, self.starts
        addresses = memory.put(np.array([p.address for p in pools], np.uint64))
        beside = [None if t is None else memory.put(raw(t), alignment) for t in (self.src, self.bias)]
        if dependent and beside[0] is not None:
            sim.written_before(beside[0])
        return (addresses, *(memory.put(raw(t)) for t in parts)), beside

    def sizes(self, arch: int, dependent: bool = False) -> np.ndarray:
        """As launchers take them."""
        return np.array([
            CODES[self.dtype], CODES[self.pools[0].dtype], self.N + self.gap, self.K + self.gap, self.M, self.N, self.K,
            len(self.rows), self.max_rank, int(dependent), arch, len(self.pools), len(self.vectors), self.N,
            0 if self.bias is None else CODES[self.bias.dtype],
        ])  # fmt: skip

    def put_x(self, memory) -> ctypes.c_void_p:
        """The last row ends at the guard page, with a gap that nothing may touch before each other row."""
        padded = torch.nn.functional.pad(self.x, (self.gap, 0), value=float("nan"))
        x = memory.put(raw(padded), 16 if self.bank else None)
        return ctypes.c_void_p(x.address + self.gap * self.x.element_size())

    def scale(self, sim, **how) -> torch.Tensor:
        """x as it enters the base product."""
        with sim.memory() as memory:
            (addresses, table, _, order, starts), _ = self.put(memory, sim, False)
            out = memory.empty((self.M, self.K + self.gap), np.int16, 16 if self.bank else None)
            sizes = self.sizes(90)
            sizes[2] = self.K + self.gap
            at = ctypes.c_void_p(out.address + self.gap * self.x.element_size())
            sim.run("sim_scale_rows", memory.put(sizes), at, self.put_x(memory), addresses, table, order, starts, **how)
            got = torch.from_numpy(out.array.copy())
            assert (got[:, : self.gap] == -1).all(), "something was written between the rows"
            return got[:, self.gap :].view(self.dtype)

    def run(self, sim, arch=80, launches=1, dependent=False, u=True, **how) -> torch.Tensor:
        """``out`` after the launches; arch 90 takes the kernel for clusters, if it is for the dtype.

        That kernel makes u too, if it is wanted, and u is checked here; of two launches the second one makes none, and the
        same bits.
        """
        library = sim.library
        library.sim_sgmv_partials.restype = library.sim_sgmv_counters.restype = ctypes.c_int64
        as64 = ctypes.c_int64
        kernel = as64(self.max_rank), CODES[self.dtype], arch
        partials = library.sim_sgmv_partials(as64(self.M), as64(self.K), *kernel)
        counters = library.sim_sgmv_counters(as64(self.M), *kernel)
        assert (counters == 0) == (arch >= 90 and self.dtype != torch.float32)
        with sim.memory(at_end=how.pop("at_end", True)) as memory:
            adapters, beside = self.put(memory, sim, dependent)
            x_at, pad = self.put_x(memory), torch.nn.functional.pad
            y = raw(pad(self.y, (self.gap, 0), value=1.0))
            count, partial, want_u, u = None, None, u and not counters, None
            if want_u:
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
                    "sim_sgmv_add", memory.put(self.sizes(arch, dependent)), at, x_at, *adapters, None if launch else u, partial,
                    count, *beside, **how,
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
    """The result of a batch: right but for one rounding; rows without an adapter as they were, unless all rows change."""
    expected = batch.expected()
    bad = expected.isnan()
    assert torch.equal(got.isnan(), bad)
    error = (got.double() - expected).abs()[~bad]
    size = expected.abs()[~bad] + 4
    assert (error <= ROUNDING[batch.dtype] * size).all(), (error / size).max()
    if batch.src is None and batch.bias is None:
        base = batch.ids == -1
        assert torch.equal(got[base], batch.y[base]), "rows without an adapter have changed"


def check_scaled(batch: Batch, got: torch.Tensor) -> None:
    """Rows times their p_b, rounded once; others bit by bit."""
    for t, slot in enumerate(batch.ids.tolist()):
        own = batch.own[slot] if 0 <= slot < len(batch.rows) else {}
        assert torch.equal(got[t], (batch.x[t].float() * own.get("p_b", 1.0)).to(batch.dtype))

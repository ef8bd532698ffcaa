"""Row norms of W + s B A from one read of W, run on the CPU: against fp64, as close as fp32 eager."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

MODES = [(schedule, completion) for schedule in (0, 1) for completion in (0, 1)]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]


def raw(t: torch.Tensor) -> np.ndarray:
    """The bits of a tensor."""
    return t.numpy() if t.dtype == F32 else t.view(torch.int16).numpy()


class Case:
    """Operands. ``size`` of W's elements (0: the branch is all there is), ``gap`` between rows, ``shift`` of its address."""

    def __init__(
        self, N, K, R, dtype=BF16, adapter=F32, size=0.05, gap=0, shift=0, transposed=False, scaling=-0.75, seed=0
    ):
        gen = torch.Generator().manual_seed(seed + 7919 * N + K + R)
        self.N, self.K, self.R, self.dtype, self.adapter, self.scaling = N, K, R, dtype, adapter, scaling
        self.row, self.shift = K + gap, shift
        self.store = torch.full((shift + N * self.row,), float("nan")).to(dtype)
        self.w = self.store[shift:].view(N, self.row)[:, :K]
        self.w[...] = (size * torch.randn(N, K, generator=gen)).to(dtype)

        def adapters(rows, columns):
            m = torch.randn(rows, columns, generator=gen).to(adapter)
            return m.t().contiguous().t() if transposed else m

        self.a, self.b = adapters(R, K), adapters(N, R)

    def expected(self) -> torch.Tensor:
        return (self.w.double() + self.scaling * (self.b.double() @ self.a.double())).norm(dim=1)

    def run(self, sim, at_end=True, **how) -> torch.Tensor:
        library = sim.library
        library.sim_lora_row_norm_partials.restype = ctypes.c_int64
        partials = library.sim_lora_row_norm_partials(*map(ctypes.c_int64, (self.N, self.K, self.R)))
        sizes = [CODES[self.dtype], self.N, self.K, self.R, self.row, CODES[self.adapter]]
        sizes += [*self.a.stride(), *self.b.stride(), 1 - how.get("seed", 0) % 2]
        with sim.memory(at_end=at_end) as memory:
            aligned = 16 if not at_end or self.store.numel() % 8 == 0 else None
            store = memory.put(raw(self.store), alignment=aligned)
            a, b = (memory.put(raw(torch.as_strided(m, (m.numel(),), (1,)))) for m in (self.a, self.b))
            out = memory.empty(self.N, np.float32)
            sim.run(
                "sim_lora_row_norm", memory.put(np.array(sizes, np.int64)),
                ctypes.c_void_p(store.address + 2 * self.shift), a, b,
                memory.put(np.array([self.scaling], np.float32)), out,
                memory.empty(partials, np.float32) if partials else None, **how,
            )  # fmt: skip
            return torch.from_numpy(out.array.copy())


def check(case: Case, got: torch.Tensor) -> None:
    """Three fp32 roundings' worth: sums of positive numbers in blocks, of exact terms."""
    expected = case.expected()
    error = (got.double() - expected).abs()
    assert (error <= 3 * 2.0**-24 * expected + 1e-30).all(), (error / expected).max() * 2**24


@pytest.mark.parametrize("dtype, adapter", PAIRS)
@pytest.mark.parametrize("N, K, R", [(1, 1, 1), (5, 70, 3), (33, 520, 16), (130, 264, 17), (3, 200, 100)])
def test_norms(sim, N, K, R, dtype, adapter):
    """One strip or several, steps of 16 ranks, W or the branch alone."""
    for size in (0.05, 0.0):
        case = Case(N, K, R, dtype, adapter, size, gap=-K % 8, transposed=R % 2 == 1)
        check(case, case.run(sim, seed=N, at_end=size > 0))


@pytest.mark.parametrize("dtype, adapter", PAIRS)
def test_more_ranks_than_a_block_holds(sim, dtype, adapter):
    case = Case(20, 72, 200, dtype, adapter)
    check(case, case.run(sim))


def test_blocks_walk_several_tiles(sim):
    """More rows than blocks for them."""
    case = Case(128 * 270 + 5, 3, 2, adapter=BF16)
    check(case, case.run(sim))


def test_many_strips(sim):
    case = Case(2, 5000, 65, size=1.0)
    check(case, case.run(sim))


def test_no_cancellation_is_lost(sim):
    """W nearly equal to -s B A: what is left is of the size of W's rounding."""
    case = Case(16, 136, 8, F16)
    case.w[...] = (-case.scaling * (case.b.double() @ case.a.double())).to(F16)
    expected, got = case.expected(), case.run(sim)
    delta = (case.scaling * (case.b.double() @ case.a.double())).norm(dim=1)
    assert ((got.double() - expected).abs() <= 2.0**-22 * delta).all()


@pytest.mark.parametrize("gap, shift", [(0, 0), (1, 0), (0, 1), (8, 8), (3, 5)])
@pytest.mark.parametrize("at_end", [False, True])
def test_addresses_that_are_not_aligned(sim, gap, shift, at_end):
    for K in (61, 64):
        case = Case(19, K, 2, gap=gap, shift=shift)
        check(case, case.run(sim, at_end=at_end))


@pytest.mark.parametrize("N, K, R", [(0, 8, 2), (3, 0, 2), (9, 20, 0)])
def test_nothing_to_add(sim, N, K, R):
    case = Case(N, K, R)
    check(case, case.run(sim))


@pytest.mark.parametrize("mode", MODES)
def test_every_schedule_gives_the_same_bits(sim, mode):
    for R in (16, 150):
        case = Case(40, 600 if R == 16 else 64, R)
        expected = case.run(sim)
        for seed in range(2):
            assert torch.equal(case.run(sim, seed=seed, mode=mode, resident=seed + 1), expected)


def test_a_row_does_not_depend_on_the_others(sim):
    together = Case(150, 520, 6)
    expected = together.run(sim)
    alone = Case(1, 520, 6)
    alone.w[...], alone.a, alone.b = together.w[77:78], together.a, together.b[77:78].clone()
    assert torch.equal(alone.run(sim), expected[77:78])

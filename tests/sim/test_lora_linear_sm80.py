"""Base product and low-rank term in one tile, run on the CPU: against the equation in fp64, and bit against bit."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from peftkern.ops.dropout_mask import dropout_mask_ref

MODES = [(schedule, completion) for schedule in (0, 1) for completion in (0, 1)]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PAIRS = [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
]  # fmt: skip
HALVES = [torch.bfloat16, torch.float16]
# One rounding of the result; beside it, relative to the sum of sizes, fp32 sums and the 16 bits of two terms.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUM_ERROR, TERMS_ERROR = 3e-7, 2.0**-16
LARGE, MEDIUM, SMALL = range(3)
# Sizes and multiprocessors that get each tile.
TILES = {LARGE: (128, 256, 1), MEDIUM: (128, 128, 1), SMALL: (64, 64, 100)}


def raw(t: torch.Tensor) -> np.ndarray:
    """The bits of a tensor."""
    return t.numpy() if t.dtype in (torch.float32, torch.int64) else t.view(torch.int16).numpy()


def padded(rows: int, columns: int, pad: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Rows that are ``pad`` elements longer than what may be read; None: as many as aligned rows need."""
    pad = -columns % 8 if pad is None else pad
    return torch.full((rows, columns + pad), float("nan"), dtype=dtype)


@dataclass
class Problem:
    """by_row: w lies as (K, N). transposed: b lies as (R, N). p: dropout of the result. W = 0 with ``zero``."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    adapter: torch.dtype
    seed: int = 0
    by_row: bool = False
    transposed: bool = False
    pad: int | None = 0
    p: float = 0.0
    scaled: bool = False
    bias: torch.dtype | None = None
    zero: bool = False
    size: float = 0.05
    multiprocessors: int = 100

    def __post_init__(self):
        gen = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=gen)

        M, N, K, R = self.M, self.N, self.K, self.R
        self.x = padded(M, K, self.pad, self.dtype)
        self.x[:, :K] = randn(M, K)
        self.w = padded(K if self.by_row else N, N if self.by_row else K, self.pad, self.dtype)
        self.w[:, : N if self.by_row else K] = 0 if self.zero else randn(*((K, N) if self.by_row else (N, K)))
        self.v = randn(M, R)
        self.b = padded(R if self.transposed else N, N if self.transposed else R, self.pad, self.adapter)
        self.b[:, : N if self.transposed else R] = self.size * randn(*((R, N) if self.transposed else (N, R)))
        self.d, self.g_b, self.g_d = (randn(R), randn(N), randn(N)) if self.scaled else (None, None, None)
        self.bias_values = None if self.bias is None else randn(N).to(self.bias)
        self.key = torch.tensor([-(2**50) + 3 * self.seed])
        self.scaling = 1.5

    def check(self, got: torch.Tensor) -> None:
        x, v = self.x[:, : self.K].double(), self.v.double() * self.scaling
        w = self.w[:, : self.N].double() if self.by_row else self.w[:, : self.K].double().t()
        b = self.b[:, : self.N].double() if self.transposed else self.b[:, : self.R].double().t()
        if self.d is not None:
            v, b = v * self.d.double(), b * self.g_d.double()
        base, low, size, low_size = x @ w, v @ b, x.abs() @ w.abs(), v.abs() @ b.abs()
        if self.p > 0:
            keep = dropout_mask_ref(self.key, self.M, self.N, self.p) / (1 - self.p)
            low, low_size = low * keep, low_size * keep
        if self.g_b is not None:
            base, size = base * self.g_b.double(), size * self.g_b.double().abs()
        expected = base + low
        if self.bias_values is not None:
            expected = expected + self.bias_values.double()
            size = size + self.bias_values.double().abs()
        allowed = ROUNDING[self.dtype] * expected.abs() + SUM_ERROR * size + TERMS_ERROR * low_size
        allowed += 2.0**-24 if self.dtype == torch.float16 else 0.0  # the smallest fp16 values
        error = (got.double() - expected).abs()
        assert (error <= allowed).all(), (error / allowed).max()

    def run(self, sim, at_end=True, shift=0, **how) -> torch.Tensor:
        """``shift``: elements by which the matrices begin off an aligned address."""
        out = padded(self.M, self.N, self.pad, self.dtype)
        bias = torch.float32 if self.bias is None else self.bias
        b_strides = (1, self.b.stride(0)) if self.transposed else (self.b.stride(0), 1)
        sizes = [
            CODES[self.dtype], CODES[self.adapter], CODES[bias], self.M, self.N, self.K, self.R, self.x.stride(0),
            self.w.stride(0), out.stride(0), int(self.by_row), *b_strides, int(self.p * 2.0**32), self.multiprocessors,
        ]  # fmt: skip
        numbers = np.array([self.scaling, 1 / (1 - self.p)], np.float32)
        with sim.memory(at_end=at_end) as memory:

            def put(t: torch.Tensor | None) -> int:
                if t is None:
                    return 0
                flat = raw(t).reshape(-1)
                buffer = memory.put(np.concatenate([np.zeros(shift, flat.dtype), flat]), alignment=16)
                return buffer.address + shift * flat.itemsize

            results = memory.put(np.concatenate([np.zeros(shift, np.int16), raw(out).reshape(-1)]), alignment=16)
            tensors = [
                put(self.x), put(self.w), results.address + 2 * shift, put(self.v), put(self.b), put(self.d),
                put(self.g_b), put(self.g_d), put(self.bias_values), put(self.key) if self.p > 0 else 0,
            ]  # fmt: skip
            arguments = [memory.put(np.array(sizes)), memory.put(numbers), memory.put(np.array(tensors, np.uint64))]
            takes = sim.library.sim_lora_linear_sm80_takes
            assert takes(*(ctypes.c_void_p(a.address) for a in arguments))
            sim.run("sim_lora_linear_sm80", *arguments, **how)
            got = torch.from_numpy(results.array[shift:].copy()).view(self.dtype).reshape(out.shape)
        assert got[:, self.N :].isnan().all(), "something was written beside the rows"
        return got[:, : self.N]


def tile_of(sim, problem: Problem) -> int:
    return sim.library.sim_lora_linear_sm80_tile(
        ctypes.c_int64(problem.M), ctypes.c_int64(problem.N), ctypes.c_int64(problem.multiprocessors)
    )


@pytest.mark.parametrize("dtype, adapter", PAIRS)
@pytest.mark.parametrize(
    "M, N, K, R",
    [(1, 1, 1, 1), (7, 40, 33, 3), (65, 70, 64, 16), (33, 120, 232, 17), (5, 71, 39, 6), (2, 9, 0, 8), (16, 64, 40, 0)],
)
def test_small_tiles(sim, M, N, K, R, dtype, adapter):
    for i in range(4):
        problem = Problem(
            M, N, K, R, dtype, adapter, seed=i, by_row=i % 2 == 1, transposed=i in (1, 2), pad=(0, None, 3, None)[i],
            p=0.3 * (i % 2), scaled=i == 2, bias=(None, torch.float32, dtype, None)[i], zero=i == 3,
        )  # fmt: skip
        assert tile_of(sim, problem) == SMALL
        problem.check(problem.run(sim, at_end=i % 2 == 0, seed=i))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("tile", [LARGE, MEDIUM])
def test_wide_tiles(sim, tile, by_row, dtype):
    rows, columns, units = TILES[tile]
    for i, (M, N, K, R) in enumerate([(rows, columns, 64, 16), (rows - 7, columns - 3, 105, 37)]):
        problem = Problem(
            M, N, K, R, dtype, torch.float32, seed=i, by_row=by_row, transposed=i == 1, pad=None if i else 0, p=0.25 * i,
            scaled=i == 1, bias=torch.float32, multiprocessors=units,
        )  # fmt: skip
        assert tile_of(sim, problem) == tile
        problem.check(problem.run(sim, at_end=not by_row, seed=i))


@pytest.mark.parametrize("dtype", HALVES)
def test_many_tiles(sim, dtype):
    """More row tiles than are walked column by column, and a last group of fewer."""
    problem = Problem(17 * 64 + 5, 130, 33, 4, dtype, torch.float32)
    assert tile_of(sim, problem) == SMALL
    problem.check(problem.run(sim))


@pytest.mark.parametrize("dtype, adapter", PAIRS)
def test_high_ranks(sim, dtype, adapter):
    for transposed in (False, True):
        problem = Problem(20, 48, 16, 128, dtype, adapter, transposed=transposed, p=0.1, zero=True)
        problem.check(problem.run(sim))


@pytest.mark.parametrize("dtype, adapter", PAIRS)
@pytest.mark.parametrize("by_row", [False, True])
def test_misaligned_addresses(sim, by_row, dtype, adapter):
    for shift, pad in ((1, 0), (0, 1), (2, 6)):
        problem = Problem(37, 72, 72, 12, dtype, adapter, by_row=by_row, pad=pad, bias=dtype)
        problem.check(problem.run(sim, shift=shift))


@pytest.mark.parametrize("tile", TILES)
def test_misaligned_addresses_in_every_tile(sim, tile):
    rows, columns, units = TILES[tile]
    for by_row in (False, True):
        problem = Problem(
            rows - 1, columns - 9, 40, 5, torch.bfloat16, torch.float32, by_row=by_row, pad=1, multiprocessors=units
        )
        assert tile_of(sim, problem) == tile
        problem.check(problem.run(sim, shift=1))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_adapters_beyond_the_range_of_fp16(sim, dtype, size):
    problem = Problem(9, 24, 8, 5, dtype, torch.float32, zero=True, size=size)
    problem.scaling = 1 / size
    problem.check(problem.run(sim))


@pytest.mark.parametrize("mode", MODES)
def test_every_schedule_gives_the_same_bits(sim, mode):
    for i, dtype in enumerate(HALVES):
        problem = Problem(70, 72, 304, 40, dtype, torch.float32, by_row=i == 1, transposed=i == 1, p=0.2)
        expected = problem.run(sim)
        problem.check(expected)
        for seed in range(3):
            assert torch.equal(problem.run(sim, seed=seed, mode=mode, resident=1 + seed), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tile", [LARGE, MEDIUM])
def test_every_schedule_gives_the_same_bits_in_wide_tiles(sim, tile, mode):
    rows, columns, units = TILES[tile]
    problem = Problem(
        rows, columns, 200, 20, torch.bfloat16, torch.float32, by_row=mode[0] == 1, p=0.2, multiprocessors=units
    )
    expected = problem.run(sim)
    problem.check(expected)
    assert torch.equal(problem.run(sim, seed=5, mode=mode), expected)


def test_every_tile_gives_the_same_bits(sim):
    """Which tile a problem gets is a matter of speed alone."""
    got = []
    for tile, (_, _, units) in TILES.items():
        problem = Problem(128, 256, 72, 9, torch.bfloat16, torch.float32, p=0.1, multiprocessors=units)
        if tile == MEDIUM:
            problem.multiprocessors = 2
        assert tile_of(sim, problem) == tile
        got.append(problem.run(sim))
    problem.check(got[0])
    assert all(torch.equal(got[0], other) for other in got[1:])


def test_tiles_of_common_problems(sim):
    def tile(M: int, N: int) -> int:
        return tile_of(sim, Problem(M, N, 1, 0, torch.bfloat16, torch.float32, multiprocessors=108))

    assert tile(8192, 4096) == LARGE
    assert tile(1, 4096) == tile(64, 14336) == SMALL
    assert tile(1024, 1024) == MEDIUM


def test_nothing_to_write(sim):
    for M, N in ((0, 8), (8, 0)):
        assert Problem(M, N, 8, 4, torch.bfloat16, torch.float32).run(sim).shape == (M, N)

"""The tall matrix against a few rows, run on the CPU: against the equation in fp64, and bit against bit."""

from __future__ import annotations

import ctypes

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
# Products are exact or nearly so: what is left is the rounding of an fp32 sum, relative to the sum of sizes.
SUM_ERROR = 3e-7


def raw(t: torch.Tensor) -> np.ndarray:
    """The bits of a tensor."""
    return t.numpy() if t.dtype in (torch.float32, torch.int64) else t.view(torch.int16).numpy()


class Problem:
    """``transposed``: p lies as B^T, ranks adjacent. Rows of ``in`` and of p are ``pad`` elements longer."""

    def __init__(
        self, M, C, R, dtype, adapter, seed=0, transposed=False, pad=0, scaled=False, ranked=False, p=0.0, large=False
    ):
        gen = torch.Generator().manual_seed(seed)
        self.M, self.C, self.R, self.p = M, C, R, p
        self.x = torch.full((M, C + pad), float("nan"), dtype=dtype)
        self.x[:, :C] = torch.randn(M, C, generator=gen).to(dtype)
        a = (torch.randn(R, C, generator=gen) * (1e30 if large else 1e-3)).to(adapter)
        self.a = torch.full((C, R + pad) if transposed else (R, C + pad), float("nan"), dtype=adapter)
        self.view = self.a[:, :R].t() if transposed else self.a[:, :C]
        self.view.copy_(a)
        self.scale = torch.randn(C, generator=gen) if scaled else None
        self.d = torch.randn(R, generator=gen) if ranked else None
        self.seed = torch.tensor([-(2**45) + 77 * seed])
        self.alpha = 1.25

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The value and the sum of the sizes of its terms."""
        x, a = self.x[:, : self.C].double(), self.view.double()
        if self.p > 0:
            x = x * dropout_mask_ref(self.seed, self.M, self.C, self.p) / (1 - self.p)
        a = a * self.alpha
        if self.scale is not None:
            a = a * self.scale.double()
        if self.d is not None:
            a = a * self.d.double()[:, None]
        return x @ a.t(), x.abs() @ a.abs().t()

    def run(self, sim, at_end=True, shift=0, **how) -> torch.Tensor:
        """``shift``: elements by which the matrices begin off an aligned address."""
        count = sim.library.sim_lora_shrink_partials
        count.restype, count.argtypes = ctypes.c_int64, [ctypes.c_int64] * 4
        code = CODES[self.x.dtype]
        partials = count(self.M, self.C, self.R, code)
        sizes = [
            code, CODES[self.a.dtype], self.M, self.C, self.R, self.x.stride(0), *self.view.stride(), int(self.p * 2.0**32)
        ]  # fmt: skip
        numbers = np.array([self.alpha, 1 / (1 - self.p)], np.float32)

        with sim.memory(at_end=at_end) as memory:

            def put(t: torch.Tensor | None, align: bool = False):
                if t is None:
                    return None
                flat = raw(t).reshape(-1)
                if not align:
                    return memory.put(flat)
                buffer = memory.put(np.concatenate([np.zeros(shift, flat.dtype), flat]), alignment=16)
                return ctypes.c_void_p(buffer.address + shift * flat.itemsize)

            out = memory.empty((self.M, self.R), np.float32)
            sim.run(
                "sim_lora_shrink", memory.put(np.array(sizes)), memory.put(numbers), put(self.x, True),
                put(self.a, True), put(self.scale), put(self.d),
                memory.put(self.seed.numpy()) if self.p > 0 else None, out,
                memory.empty(partials, np.float32) if partials else None, **how,
            )  # fmt: skip
            return torch.from_numpy(out.array.copy())

    def check(self, got: torch.Tensor) -> None:
        expected, size = self.expected()
        error = (got.double() - expected).abs()
        assert (error <= SUM_ERROR * size).all(), (error / size).max()


@pytest.mark.parametrize("dtype, adapter", PAIRS)
@pytest.mark.parametrize(
    "M, C, R",
    [(1, 1, 1), (3, 8, 16), (17, 40, 5), (70, 67, 17), (2, 1096, 3), (65, 264, 64), (5, 131, 128), (9, 2056, 8)],
)
def test_against_the_equation(sim, M, C, R, dtype, adapter):
    even = C % 8 == 0
    Problem(M, C, R, dtype, adapter).check(Problem(M, C, R, dtype, adapter).run(sim, seed=M))
    problem = Problem(M, C, R, dtype, adapter, seed=1, transposed=True, pad=8 if even else 3, p=0.3, ranked=True)
    problem.check(problem.run(sim, at_end=False, seed=C))
    # Rows begin at aligned addresses, whatever their length.
    problem = Problem(M, C, R, dtype, adapter, seed=2, pad=8 + -C % 8, scaled=True, transposed=M % 2 == 1)
    problem.check(problem.run(sim, seed=R))


@pytest.mark.parametrize("dtype, adapter", PAIRS)
def test_misaligned_addresses(sim, dtype, adapter):
    for shift in (1, 4):
        problem = Problem(19, 72, 9, dtype, adapter, seed=shift, p=0.1)
        problem.check(problem.run(sim, shift=shift))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_beyond_the_range_of_fp16(sim, dtype):
    problem = Problem(4, 32, 4, dtype, torch.float32, large=True)
    problem.check(problem.run(sim))


@pytest.mark.parametrize("dtype, adapter, R", [(*PAIRS[0], 24), (*PAIRS[1], 5), (*PAIRS[3], 40)])
def test_rows_get_the_same_bits_in_every_batch(sim, dtype, adapter, R):
    """Alone, with a few others through memory, and with many in one kernel."""
    many = Problem(96 * 64, 1100, R, dtype, adapter, p=0.2)
    bits = many.run(sim)
    assert sim.library.sim_lora_shrink_partials(many.M, many.C, R, CODES[dtype]) == 0
    many.check(bits)
    for rows in (1, 67):
        few = Problem(96 * 64, 1100, R, dtype, adapter, p=0.2)
        few.M, few.x = rows, few.x[:rows]
        assert sim.library.sim_lora_shrink_partials(few.M, few.C, R, CODES[dtype]) > 0
        assert torch.equal(few.run(sim), bits[:rows])


@pytest.mark.parametrize("mode", MODES)
def test_every_schedule_gives_the_same_bits(sim, mode):
    for problem in (
        Problem(66, 1100, 7, torch.bfloat16, torch.float32, p=0.1),
        Problem(20, 200, 40, torch.float16, torch.float32, transposed=True),
    ):
        expected = problem.run(sim)
        problem.check(expected)
        for seed in range(3):
            assert torch.equal(problem.run(sim, seed=seed, mode=mode, resident=1 + seed), expected)


def test_nothing_to_sum_or_to_write(sim):
    assert not Problem(3, 0, 4, torch.bfloat16, torch.float32).run(sim).any()
    assert Problem(0, 8, 4, torch.bfloat16, torch.float32).run(sim).shape == (0, 4)
    assert Problem(3, 8, 0, torch.bfloat16, torch.float32).run(sim).shape == (3, 0)

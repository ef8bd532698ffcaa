"""The adapters' gradients from one pass, run on the CPU: against the equation in fp64, and bit for bit by schedule."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from peftkern.ops.dropout_mask import dropout_mask_ref

MODES = [(schedule, completion) for schedule in (0, 1) for completion in (0, 1)]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Of the sum of absolute values: fp32 sums of exact terms; two terms of v, whose product is rounded to a half anyway.
EXACT, TWO_TERMS = 1e-6, 2.0**-16
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def raw(t: torch.Tensor) -> np.ndarray:
    """The bits of a tensor."""
    return t.numpy() if t.dtype in (F32, torch.int64) else t.view(torch.int16).numpy()


class Case:
    """Operands of one call. ``gap``: elements between rows of `in`, whose address is ``shift`` elements off."""

    def __init__(
        self, M, C, R, dtype=BF16, adapter=F32, parts="gdc", scales=False, p_drop=0.0, seed=0, gap=0, shift=0,
        transposed=False,
    ):  # fmt: skip
        gen = torch.Generator().manual_seed(seed + 7919 * M + C)
        self.M, self.C, self.R, self.dtype, self.adapter, self.parts = M, C, R, dtype, adapter, parts
        self.row, self.shift, self.transposed, self.p_drop = C + gap, shift, transposed, p_drop
        self.store = torch.full((shift + M * self.row,), float("nan")).to(dtype)
        self.x = self.store[shift:].view(M, self.row)[:, :C]
        self.x[...] = torch.randn(M, C, generator=gen).to(dtype)
        # From one size to far below what fp16 holds, as early in training.
        self.v = torch.randn(M, R, generator=gen) * 10.0 ** -torch.randint(0, 9, (R,), generator=gen).float()
        p = torch.randn(R, C, generator=gen) * 10.0 ** -torch.randint(0, 4, (R, 1), generator=gen).float()
        p = p.to(adapter)
        self.p = p.t().contiguous().t() if transposed else p
        self.scale = {
            name: torch.randn(size, generator=gen) if scales else None
            for name, size in (("v", R), ("column", C), ("rank", R))
        }
        self.alpha, self.down_alpha = 1.5, -0.75
        self.seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=gen)

    def expected(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Each part and the same sum of absolute values."""
        x, v, p = self.x.double(), self.v.double(), self.p.double()
        v = v if self.scale["v"] is None else v * self.scale["v"].double()
        g = torch.ones(self.C).double() if self.scale["column"] is None else self.scale["column"].double()
        d = torch.ones(self.R).double() if self.scale["rank"] is None else self.scale["rank"].double()
        kept = x
        if self.p_drop > 0:
            kept = torch.where(dropout_mask_ref(self.seed, self.M, self.C, self.p_drop), x / (1 - self.p_drop), 0.0)

        def both(product, *factors):
            return product(*factors), product(*(f.abs() for f in factors)).abs()

        return {
            "g": both(lambda v, t, g: self.alpha * (v.t() @ t) * g, v, kept, g),
            "d": both(lambda t, p, g, d: self.down_alpha * (t @ (p * g).t()) * d, x, p, g, d),
            "c": both(lambda t: t.sum(0), x),
        }

    def run(self, sim, at_end=True, **how) -> dict[str, torch.Tensor]:
        library = sim.library
        library.sim_lora_grad_partials.restype = ctypes.c_int64
        R, C, M = self.R, self.C, self.M
        strides = (1, R + 3) if self.transposed else (C, 1)
        sizes = [CODES[self.dtype], M, C, R, self.row, CODES[self.adapter], *strides, CODES[self.adapter]]
        sizes += [*self.p.stride(), 1 - how.get("seed", 0) % 2]
        with sim.memory(at_end=at_end) as memory:
            # Flush with a guard page at its end, so the start of an aligned matrix may have to give way.
            store = memory.put(raw(self.store), alignment=16 if not at_end or self.store.numel() % 8 == 0 else None)
            x = ctypes.c_void_p(store.address + 2 * self.shift)

            def put(wanted, t):
                return memory.put(raw(t)) if wanted and t is not None else None

            def out(wanted, shape, dtype=F32):
                return memory.empty(shape, np.float32 if dtype == F32 else np.int16) if wanted else None

            has_g, has_d, has_c = ("g" in self.parts, "d" in self.parts, "c" in self.parts)
            grad = out(has_g, (R - 1) * strides[0] + (C - 1) * strides[1] + 1 if R and C else 0, self.adapter)
            p_store = torch.as_strided(self.p, (self.p.numel(),), (1,))
            down, colsum = out(has_d, (M, R)), out(has_c, (C,))
            numbers = np.array([self.alpha, self.down_alpha, 1 / (1 - self.p_drop)], np.float32)
            arguments = [
                memory.put(np.array(sizes, np.int64)), memory.put(numbers), x, put(has_g, self.v),
                put(has_g, self.scale["v"]), put(True, self.scale["column"]), grad, put(has_d, p_store),
                put(has_d, self.scale["rank"]), down, colsum, put(self.p_drop > 0, self.seed),
                int(self.p_drop * 2.0**32),
            ]  # fmt: skip
            plain = [ctypes.c_void_p(a.address) if hasattr(a, "address") else a for a in arguments[:-1]]
            partials = library.sim_lora_grad_partials(*plain, ctypes.c_int64(arguments[-1]))
            sim.run("sim_lora_grad", *arguments, memory.empty(partials, np.float32) if partials else None, **how)
            got = {}
            if has_g:
                flat = torch.from_numpy(grad.array.copy()).view(self.adapter)
                got["g"] = flat.as_strided((R, C), strides) if flat.numel() else flat.view(R, C)
                rest = torch.ones_like(flat, dtype=torch.bool)
                if flat.numel():
                    rest.as_strided((R, C), strides).fill_(False)
                assert flat[rest].isnan().all(), "something was written between grad's columns"
            if has_d:
                got["d"] = torch.from_numpy(down.array.copy())
            if has_c:
                got["c"] = torch.from_numpy(colsum.array.copy())
            return got


def check(case: Case, got: dict[str, torch.Tensor]) -> None:
    expected = case.expected()
    assert set(got) == set(case.parts)
    half = case.adapter != F32
    for part, values in got.items():
        exact, size = expected[part]
        bound = size * (TWO_TERMS if half and part == "g" else EXACT) + 1e-37
        if part == "g":
            bound = bound + exact.abs() * ROUNDING[case.adapter] + (2.0**-24 if case.adapter == F16 else 0.0)
        if part == "d" and half and case.scale["column"] is not None:
            bound = size * TWO_TERMS
        error = (values.double() - exact).abs()
        assert (error <= bound).all(), f"{part}: {(error / bound).max()} times the bound"


PAIRS = [(BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]
SHAPES = [(1, 1, 1), (37, 264, 3), (161, 40, 16), (70, 515, 17), (16, 131, 45)]


@pytest.mark.parametrize("dtype, adapter", PAIRS)
@pytest.mark.parametrize("M, C, R", SHAPES)
def test_all_parts(sim, M, C, R, dtype, adapter):
    """One strip or several, one range or several, ranks of one chunk and of two."""
    case = Case(M, C, R, dtype, adapter, scales=M % 2 == 0, gap=-C % 8, transposed=R % 2 == 1)
    check(case, case.run(sim, seed=M, at_end=False))


@pytest.mark.parametrize("parts", ["g", "d", "c", "gd", "gc", "dc"])
def test_each_part_by_itself(sim, parts):
    case = Case(70, 300, 5, parts=parts, scales=True, gap=4)
    check(case, case.run(sim, at_end=False))


@pytest.mark.parametrize("dtype, adapter", PAIRS)
@pytest.mark.parametrize("M, C, R, p_drop", [(150, 24, 4, 0.1), (33, 270, 20, 0.5)])
def test_dropout_is_that_of_the_mask(sim, M, C, R, p_drop, dtype, adapter):
    case = Case(M, C, R, dtype, adapter, parts="g", p_drop=p_drop, gap=-C % 8)
    check(case, case.run(sim, at_end=False))


def test_dropout_is_of_grad_alone(sim):
    case = Case(40, 264, 4, parts="gdc", p_drop=0.25)
    check(case, case.run(sim))


@pytest.mark.parametrize("gap, shift", [(0, 0), (1, 0), (0, 1), (8, 8), (3, 5)])
@pytest.mark.parametrize("at_end", [False, True])
def test_addresses_that_are_not_aligned(sim, gap, shift, at_end):
    """Rows of an odd length, and a matrix that begins anywhere: nothing past either end is read."""
    for C in (261, 264):
        case = Case(19, C, 5, parts="g", gap=gap, shift=shift)
        check(case, case.run(sim, at_end=at_end))


def test_many_ranks_go_in_chunks(sim):
    case = Case(33, 24, 128, parts="gd")
    check(case, case.run(sim))


@pytest.mark.parametrize("M, C, R", [(0, 20, 3), (20, 0, 3), (20, 24, 0)])
def test_nothing_to_add(sim, M, C, R):
    case = Case(M, C, R)
    got = case.run(sim)
    check(case, got)
    assert not got["g"].any() and not got["d"].any()


@pytest.mark.parametrize("parts, p_drop", [("gdc", 0.0), ("g", 0.1)])
@pytest.mark.parametrize("mode", MODES)
def test_every_schedule_gives_the_same_bits(sim, mode, parts, p_drop):
    case = Case(300, 260, 20, parts=parts, p_drop=p_drop, gap=4)
    expected = case.run(sim)
    check(case, expected)
    for seed in range(2):
        got = case.run(sim, seed=seed, mode=mode, resident=seed + 1)
        assert all(torch.equal(got[part], expected[part]) for part in parts)


def test_down_of_a_row_does_not_depend_on_the_others(sim):
    together = Case(200, 520, 6, parts="d")
    expected = together.run(sim)["d"]
    for first, count in ((0, 1), (70, 33)):
        alone = Case(count, 520, 6, parts="d")
        alone.x[...], alone.p = together.x[first : first + count], together.p
        assert torch.equal(alone.run(sim)["d"], expected[first : first + count])

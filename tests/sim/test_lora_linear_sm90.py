"""The fused linear layer for Hopper, run on the CPU: ragged shapes, ranks, layouts, dropout, against fp64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from lora_linear_args import Arguments, Dropout, Matrix

from peftkern.ops.dropout_mask import dropout_mask_ref, threshold

MODES = [(schedule, completion) for schedule in (0, 1) for completion in (0, 1)]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROUNDING = {BF16: 2.0**-8, F16: 2.0**-11}


def raw(t: torch.Tensor) -> np.ndarray:
    """The bits of a tensor."""
    return t.numpy() if t.dtype in (F32, torch.int64) else t.view(torch.int16).numpy()


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype = BF16
    adapter: torch.dtype = F32
    by_row: bool = False  # w as (K, N) in memory
    b_transposed: bool = False
    p: float = 0.0  # dropout: of the low-rank term, or of x where v is made
    makes_v: bool = False
    scales: str = ""  # of "d", "g_b", "g_d"
    bias: torch.dtype | None = None
    no_base: bool = False  # w = 0
    gap: int = 0  # extra elements in rows of x and w
    out_gap: int = 0
    misaligned: bool = False  # b, v, out off 16 bytes
    multiprocessors: int = 3
    seed: int = 0

    def operands(self) -> dict[str, torch.Tensor]:
        gen = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=gen)

        t = {
            "x": normal(self.M, self.K).to(self.dtype),
            "w": (normal(self.N, self.K) / self.K**0.5 * (not self.no_base)).to(self.dtype),
            "v": normal(self.M, self.R),
            "a": (normal(self.R, self.K) / self.K**0.5).to(self.adapter),
            "b": normal(self.N, self.R).to(self.adapter),
        }
        for name, size in (("d", self.R), ("g_b", self.N), ("g_d", self.N)):
            if name in self.scales.split():
                t[name] = normal(size)
        if self.bias is not None:
            t["bias"] = normal(self.N).to(self.bias)
        if self.p > 0:
            t["seed"] = torch.tensor([self.seed * 977 + 5])
        return t

    def expected(self, t) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """out, the error that it may have, and v; all fp64."""
        d = {name: value.double() for name, value in t.items()}
        keep = torch.ones(())
        if self.p > 0:
            keep = dropout_mask_ref(t["seed"], self.M, self.K if self.makes_v else self.N, self.p) / (1 - self.p)
        v = (d["x"] * keep) @ d["a"].T if self.makes_v else d["v"]
        b = d["b"] * d["g_d"][:, None] if "g_d" in d else d["b"]
        scaled = 0.75 * v * d["d"] if "d" in d else 0.75 * v
        base = d["x"] @ d["w"].T
        base_size = d["x"].abs() @ d["w"].abs().T
        if "g_b" in d:
            base, base_size = base * d["g_b"], base_size * d["g_b"].abs()
        low, low_size = scaled @ b.T, scaled.abs() @ b.abs().T
        if not self.makes_v:
            low, low_size = low * keep, low_size * keep
        out = base + low + d.get("bias", torch.zeros(()))
        # One rounding; fp32 sums; what two bf16 terms of v, two of b and the product of the second ones leave out.
        error = ROUNDING[self.dtype] * out.abs() + 2.0**-25
        error = error + 2.0**-21 * (base_size + low_size) + 3 * 2.0**-16 * low_size
        return out, error, v

    def run(self, sim, t, launches: int = 1, at_end: bool = True, **how) -> tuple[torch.Tensor, torch.Tensor]:
        """out and v."""
        with sim.memory(at_end=at_end) as memory:

            def put(tensor, offset=0):
                # Rows of x, w and a start at multiples of 16 bytes; others may lie anywhere.
                flat = raw(tensor.contiguous()).reshape(-1)
                held = memory.put(np.concatenate([np.zeros(offset, flat.dtype), flat]), alignment=flat.itemsize)
                return ctypes.c_void_p(held.address + offset * flat.itemsize)

            def rows(tensor, gap):
                stride = -(-tensor.shape[1] // 8) * 8 + gap
                padded = torch.full((tensor.shape[0], stride), float("nan"), dtype=tensor.dtype)
                padded[:, : tensor.shape[1]] = tensor
                # Nothing may be read behind the last row's last element.
                flat = padded.reshape(-1)[: (tensor.shape[0] - 1) * stride + tensor.shape[1]]
                held = memory.put(raw(flat.contiguous()), alignment=16)
                return Matrix(held.address, CODES[tensor.dtype], stride, 1)

            off = 1 if self.misaligned else 0
            args = Arguments(M=self.M, N=self.N, K=self.K, R=self.R, scaling=0.75, multiprocessors=self.multiprocessors)
            args.w_by_row = self.by_row
            args.x = rows(t["x"], self.gap)
            args.w = rows(t["w"].T if self.by_row else t["w"], self.gap)
            b = t["b"].T if self.b_transposed else t["b"]
            strides = (1, self.N) if self.b_transposed else (self.R, 1)
            args.b = Matrix(put(b, off), CODES[self.adapter], *strides)
            for name in ("d", "g_b", "g_d"):
                if name in t:
                    setattr(args.scales, name, put(t[name]))
            if "bias" in t:
                args.bias, args.bias_dtype = put(t["bias"]), CODES[self.bias]
            if "seed" in t:
                args.dropout = Dropout(put(t["seed"]), threshold(self.p), 1 / (1 - self.p))
            counters = None
            if self.makes_v:
                held_v = memory.empty(off + self.M * self.R, np.float32)
                args.a = rows(t["a"], self.gap)
                library = sim.library
                library.sim_lora_linear_counters.restype = ctypes.c_int64
                count = library.sim_lora_linear_counters(ctypes.c_int64(self.M))
                counters = memory.put(np.zeros(count, np.uint32))
                args.counters = counters.address
            else:
                held_v = memory.put(np.concatenate([np.zeros(off, np.float32), raw(t["v"]).reshape(-1)]))
            args.v = held_v.address + 4 * off
            out_stride = self.N + self.out_gap
            size = off + (self.M - 1) * out_stride + self.N
            held_out = memory.empty(size, np.int16, alignment=2 if off or self.N % 8 else 16)
            args.out = Matrix(held_out.address + 2 * off, CODES[self.dtype], out_stride, 1)
            for _ in range(launches):
                held_out.array[...] = -1
                if self.makes_v:
                    held_v.array[...] = np.nan
                sim.run("sim_lora_linear_sm90", ctypes.byref(args), **how)
                if counters is not None:
                    assert not counters.array.any(), "the counters are not ready for the next launch"
            flat = torch.from_numpy(held_out.array[off:].copy())
            between = torch.cat([flat, torch.full((self.out_gap,), -1, dtype=torch.int16)])
            between = between.reshape(self.M, out_stride)
            assert (between[:, self.N :] == -1).all(), "something was written between the rows of out"
            v = torch.from_numpy(held_v.array[off:].copy()).reshape(self.M, self.R)
            return between[:, : self.N].contiguous().view(self.dtype), v

    def check(self, sim, **how) -> None:
        t = self.operands()
        out, v = self.run(sim, t, **how)
        expected, error, expected_v = self.expected(t)
        if self.makes_v:
            size = t["x"].double().abs() @ t["a"].double().abs().T / (1 - self.p)
            assert ((v.double() - expected_v).abs() <= 2.0**-20 * size).all(), (self, "v")
        wrong = (out.double() - expected).abs() - error
        assert not wrong.isnan().any() and wrong.max() <= 0, (self, float(wrong.max()), int((wrong > 0).sum()))


SHAPES = [
    Case(1, 1, 1, 1),
    Case(128, 256, 256, 16),
    Case(130, 264, 72, 8, multiprocessors=1),
    Case(67, 129, 37, 17, multiprocessors=2),
    Case(300, 520, 130, 40),
    Case(5, 300, 450, 128, multiprocessors=1),
    Case(129, 65, 64, 64, multiprocessors=1),
    Case(64, 40, 200, 0),
    Case(20, 24, 8, 256),
    Case(300, 520, 72, 40, multiprocessors=4),  # tiles of 256 columns
]


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: f"{c.M}x{c.N}x{c.K}-{c.R}")
def test_forward(sim, case, dtype, same):
    case = replace(case, dtype=dtype, adapter=dtype if same else F32, gap=8 * same, out_gap=3 * same)
    case.check(sim, seed=case.M, at_end=same)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "case",
    [
        Case(130, 264, 72, 8, p=0.3, multiprocessors=2),
        Case(40, 72, 200, 17, p=0.6, multiprocessors=1),
        Case(260, 500, 70, 64, p=0.1, multiprocessors=1),
        Case(9, 520, 129, 40, multiprocessors=1),
        Case(140, 300, 64, 0, p=0.5),
        Case(1, 1, 1, 1, p=0.5),
    ],
    ids=lambda c: f"{c.M}x{c.N}x{c.K}-{c.R}-{c.p}",
)
def test_input_gradient(sim, case, dtype):
    """w lies as in the forward, so columns of the result are adjacent in it; dropout is of the low-rank term."""
    for same in (False, True):
        adapter = dtype if same else F32
        case = replace(case, dtype=dtype, adapter=adapter, by_row=True, b_transposed=True, seed=case.M + same)
        case.check(sim, seed=case.M, at_end=not same)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 1, 1),
        Case(130, 264, 200, 16, p=0.3, multiprocessors=2),
        Case(140, 300, 330, 32, p=0.1, multiprocessors=3),
        Case(97, 136, 1100, 5, multiprocessors=1, scales="g_b d g_d", bias=F32),
        Case(49, 20, 37, 17, p=0.5, multiprocessors=1, misaligned=True),
        Case(520, 8, 64, 8),
    ],
    ids=lambda c: f"{c.M}x{c.N}x{c.K}-{c.R}-{c.p}",
)
def test_v_is_made_as_well(sim, case, dtype):
    for same in (False, True):
        case = replace(case, makes_v=True, dtype=dtype, adapter=dtype if same else F32, seed=case.M + same)
        case.check(sim, seed=case.M + same, at_end=not same, launches=1 + same)


SCALED = Case(131, 273, 136, 24, multiprocessors=2)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "case",
    [
        replace(SCALED, scales="g_b g_d", bias=F32),
        replace(SCALED, scales="d", bias=BF16, p=0.2),
        replace(SCALED, scales="g_d d", adapter=BF16, misaligned=True),
        replace(SCALED, scales="g_d", p=0.4, by_row=True, adapter=BF16),
        replace(SCALED, scales="g_b", R=0, bias=F32),
        replace(SCALED, bias=BF16, adapter=BF16, misaligned=True, by_row=True, N=128),
        replace(SCALED, scales="g_b d g_d", R=3, M=2, N=7),
    ],
)
def test_scales_bias_and_alignment(sim, case, dtype):
    names = {BF16: dtype, F32: F32, None: None}
    case = replace(case, dtype=dtype, adapter=names[case.adapter], bias=names[case.bias])
    for at_end in (False, True):
        replace(case, seed=int(at_end)).check(sim, seed=at_end, at_end=at_end)


@pytest.mark.parametrize("adapter", [BF16, F16, F32])
@pytest.mark.parametrize("rank", [1, 16, 128])
def test_the_low_rank_term_alone_keeps_its_bits(sim, rank, adapter):
    """w = 0, and adapters as small as lora_B is early in training: nothing falls below the range of a format."""
    case = Case(70, 136, 64, rank, dtype=BF16 if adapter == BF16 else F16, adapter=adapter, no_base=True)
    t = case.operands()
    if adapter == F32:
        t["b"], t["v"] = t["b"] * 1e-6, t["v"] * 1e6
    out, _ = case.run(sim, t)
    expected, error, _ = case.expected(t)
    assert ((out.double() - expected).abs() <= error).all()


SCHEDULED = [
    Case(140, 520, 200, 40, scales="g_b", bias=F32, multiprocessors=4),
    Case(140, 300, 270, 40, p=0.5, by_row=True, multiprocessors=2),
    Case(100, 130, 400, 200, multiprocessors=1),
    Case(140, 130, 140, 9, makes_v=True, p=0.5),
    Case(140, 300, 140, 32, makes_v=True, multiprocessors=3),
]


@pytest.fixture(scope="module")
def first_schedule(sim):
    """What each case of SCHEDULED gives under the first schedule."""
    return [case.run(sim, case.operands())[0] for case in SCHEDULED]


@pytest.mark.parametrize("mode", MODES)
def test_every_schedule_gives_the_same_bits(sim, first_schedule, mode):
    for case, expected in zip(SCHEDULED, first_schedule):
        t = case.operands()
        for seed in range(2):
            got, _ = case.run(sim, t, seed=seed, mode=mode, resident=seed + 1)
            assert torch.equal(got.view(torch.int16), expected.view(torch.int16)), (case, seed)


@pytest.mark.parametrize("mode", MODES)
def test_short_tiles(sim, mode):
    """Of one stage: warps of a group may be a tile apart, and what is shared by a tile must outlast it."""
    case = Case(70, 1100, 8, 0, scales="g_b", bias=F32, multiprocessors=1)
    for seed in range(6):
        case.check(sim, seed=seed, mode=mode)


def test_tile_width_and_blocks_do_not_change_bits(sim):
    case = Case(140, 260, 200, 24, bias=BF16)
    t = case.operands()
    runs = [replace(case, multiprocessors=count).run(sim, t)[0] for count in (1, 3, 6, 50)]
    for got in runs[1:]:
        assert torch.equal(got.view(torch.int16), runs[0].view(torch.int16))


@pytest.mark.parametrize(
    "change",
    [
        {"R": 257}, {"M": 0}, {"N": 0}, {"K": 0}, {"x_row": 36}, {"x_address": 8}, {"w_row": 16}, {"out_col": 2},
        {"b_dtype": 2}, {"x_dtype": 0}, {"g_b": 64, "seed": 64}, {"p_b": 64}, {"p_d": 64},
        {"a_row": 33}, {"a_address": 8}, {"a_row": 32, "R": 33}, {"a_row": 32, "w_by_row": True},
    ],
)  # fmt: skip
def test_declines_what_it_cannot_take(sim, change):
    def args(M=8, N=8, K=32, R=4, x_row=32, x_address=64, x_dtype=1, w_row=32, out_col=1, b_dtype=0, **more):
        made = Arguments(M=M, N=N, K=K, R=R, multiprocessors=1)
        made.x, made.w = Matrix(x_address, x_dtype, x_row, 1), Matrix(64, 1, w_row, 1)
        made.out, made.b = Matrix(64, 1, 8, out_col), Matrix(64, b_dtype, 4, 1)
        made.scales.g_b, made.dropout.seed = more.get("g_b"), more.get("seed")
        made.scales.p_b, made.scales.p_d = more.get("p_b"), more.get("p_d")
        made.w_by_row = more.get("w_by_row", False)
        if "a_row" in more or "a_address" in more:
            made.a = Matrix(more.get("a_address", 64), 0, more.get("a_row", 32), 1)
        return ctypes.byref(made)

    takes = sim.library.sim_lora_linear_sm90_takes
    assert takes(args()) == 1 and takes(args(a_row=32)) == 1
    assert takes(args(**change)) == 0

"""The linear layer over a weight in codes, run on the CPU: against the equation in fp64, and bit against bit."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lora_linear_args import Arguments, Matrix, Quantised, Scales

from peftkern.backends.cuda import OPS
from peftkern.backends.cuda import lora_linear as cuda_lora
from peftkern.bases.packed import block_length
from peftkern.testing.accuracy import judged
from peftkern.testing.arguments import forward
from peftkern.testing.bases import QUANTISED, dequantised, drawn
from peftkern.testing.problems import LoRALinearProblem

MODES = [(schedule, completion) for schedule in (0, 1) for completion in (0, 1)]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HALVES = [torch.bfloat16, torch.float16]
KINDS = [name for name in QUANTISED if name.split()[0] in cuda_lora.CODED]
# As in csrc/include/peftkern/quantised.h.
CODES = {"nf4": 0, "fp4": 1, "uint4": 3, "int4": 4, "int8": 6}
UPPER_FIRST, LOWER_FIRST, BYTES = 0, 1, 5
NESTED = 4
# One rounding of the result; beside it, relative to the sum of sizes, fp32 sums.
ROUNDING, SUM_ERROR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}, 3e-7


def raw(t: torch.Tensor) -> np.ndarray:
    """The bits of a tensor."""
    return t.view(torch.int16).numpy() if t.dtype in HALVES else t.numpy()


def described(name: str, base, N: int, K: int, put, row: int) -> Quantised:
    """A base as launchers take it. ``put``: gives a tensor's address; ``row``: codes from a row to the next."""
    codes, scales, *rest = base.tensors
    number = DTYPES[scales.dtype] if scales.is_floating_point() else NESTED
    w = Quantised(N=N, K=K, codes=put(codes), row=row, group=1, rows=1, groups=1, outer_group=1, number=number)
    w.code, w.scales = CODES[base.kind], put(scales)
    if base.kind == "int8":
        w.order, w.group = BYTES, K
    elif base.kind == "int4":
        w.order, w.groups, w.zeros = LOWER_FIRST, scales.shape[1], put(rest[0])
        w.group = K // w.groups
        w.code = CODES["int4" if codes.dtype == torch.int8 else "uint4"]
    else:
        w.order, w.flat, w.group = UPPER_FIRST, True, block_length(N * K, scales.numel())
        if rest:
            w.book, w.outer, w.offset = map(put, rest)
            w.outer_group = block_length(scales.numel(), rest[1].numel())
    return w


@dataclass
class Problem:
    """``pad``: elements behind a row of x and out, and behind a row of codes of 8 bits. ``shift``: bytes by which codes, and
    elements by which x, begin off an aligned address."""

    name: str
    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.float32
    seed: int = 0
    pad: int = 0
    shift: int = 0
    scaled: bool = False
    bias: torch.dtype | None = None
    transposed: bool = False

    def __post_init__(self):
        gen = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=gen)

        M, N, K, R = self.M, self.N, self.K, self.R
        self.x = torch.full((M, K + self.pad), float("nan"), dtype=self.dtype)
        self.x[:, :K] = randn(M, K)
        self.v, self.b = randn(M, R), randn(*((R, N) if self.transposed else (N, R))).to(self.adapter)
        self.d, self.g_b, self.g_d = (randn(R), randn(N), randn(N)) if self.scaled else (None, None, None)
        self.bias_values = None if self.bias is None else randn(N).to(self.bias)
        self.base = drawn(self.name, N, K, self.seed)
        self.weight, self.scaling = dequantised(self.base, N, K), 1.5

    def check(self, got: torch.Tensor) -> None:
        """Against products with W as it meets x: codes of 8 bits as they are, others rounded once to the dtype of x."""
        x, v, w = self.x[:, : self.K].double(), self.v.double() * self.scaling, self.weight
        w = (w if self.base.kind == "int8" else w.to(self.dtype)).double().t()
        b = self.b.double() if self.transposed else self.b.double().t()
        if self.scaled:
            v, b, w = v * self.d.double(), b * self.g_d.double(), w * self.g_b.double()
        expected, size = x @ w + v @ b, x.abs() @ w.abs() + v.abs() @ b.abs()
        if self.bias_values is not None:
            expected, size = expected + self.bias_values.double(), size + self.bias_values.double().abs()
        allowed = ROUNDING[self.dtype] * expected.abs() + SUM_ERROR * size
        allowed += 2.0**-24 if self.dtype == torch.float16 else 0.0  # the smallest fp16 values
        error = (got.double() - expected).abs()
        assert (error <= allowed).all(), (error / allowed).max()

    def run(self, sim, at_end=True, dependent=False, **how) -> torch.Tensor:
        M, N, K, R = self.M, self.N, self.K, self.R
        with sim.memory(at_end=at_end) as memory:

            def put(t: torch.Tensor | None, shift: int = 0) -> int:
                if t is None:
                    return 0
                flat = raw(t).reshape(-1)
                buffer = memory.put(np.concatenate([np.zeros(shift, flat.dtype), flat]), alignment=16)
                return buffer.address + shift * flat.itemsize

            def put_base(t: torch.Tensor) -> int:
                if t is not self.base.tensors[0]:
                    return put(t)
                if self.base.kind == "int8":
                    t = torch.cat([t, torch.full((N, self.pad), 77, dtype=t.dtype)], dim=1)
                return put(t, self.shift)

            out = memory.empty((M, K + N + self.pad), np.int16)  # rows farther apart than they are long
            w = described(self.name, self.base, N, K, put_base, K + self.pad * (self.base.kind == "int8"))
            v = memory.put(self.v.numpy())
            if dependent:
                sim.written_before(v)
            args = Arguments(
                Matrix(put(self.x, self.shift), DTYPES[self.dtype], K + self.pad, 1), Matrix(), False,
                Matrix(out.address, DTYPES[self.dtype], out.array.shape[1], 1), M, N, K, R, v.address, Matrix(),
                Matrix(put(self.b), DTYPES[self.adapter], *((1, N) if self.transposed else (R, 1))), self.scaling,
                Scales(d=put(self.d), g_b=put(self.g_b), g_d=put(self.g_d)), put(self.bias_values),
                DTYPES[self.bias or torch.float32],
            )  # fmt: skip
            assert sim.library.sim_lora_linear_codes_takes(ctypes.byref(args), ctypes.byref(w))
            sim.run("sim_lora_linear_codes", ctypes.byref(args), ctypes.byref(w), int(dependent), **how)
            got = torch.from_numpy(out.array.copy())
        assert (got[:, N:] == -1).all(), "something was written beside the rows"
        return got[:, :N].contiguous().view(self.dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", KINDS)
def test_whole_runs(sim, name, dtype):
    """K, rows and groups of whole runs: 16 bytes at a time. One tile of rows, two, four, and two blocks of four."""
    for i, (M, N, K, R) in enumerate([(1, 40, 1120, 3), (8, 32, 512, 16), (13, 33, 640, 0), (33, 70, 224, 5)]):
        problem = Problem(
            name, M, N, K, R, dtype, (torch.float32, dtype)[i % 2], seed=i, scaled=i == 3,
            bias=(None, torch.float32, None, dtype)[i], transposed=i == 0,
        )  # fmt: skip
        problem.check(problem.run(sim, at_end=i % 2 == 0, seed=i))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", KINDS)
def test_ragged_runs(sim, name, dtype):
    """Odd sizes, groups that straddle rows and runs, a single column: code by code."""
    odd = QUANTISED[name][1] == 1
    for i, (M, N, K, R) in enumerate([(1, 1, 2 - odd, 1), (5, 37, 70 - odd, 4), (34, 7, 540 + odd, 2)]):
        problem = Problem(name, M, N, K, R, dtype, seed=i, scaled=i == 1, bias=(None, dtype, torch.float32)[i])
        problem.check(problem.run(sim, at_end=i % 2 == 0, seed=i))


@pytest.mark.parametrize("name", ["nf4 nested", "int4 bf16", "int8"])
@pytest.mark.parametrize("shift, pad", [(1, 0), (0, 1), (0, 16), (0, 8), (16, 3)])
def test_any_layout(sim, name, shift, pad):
    problem = Problem(name, 9, 34, 160, 4, shift=shift, pad=pad)
    problem.check(problem.run(sim))
    problem.check(problem.run(sim, at_end=False))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["nf4 nested", "int4", "int8"])
def test_every_schedule_gives_the_same_bits(sim, name, mode):
    """Whether what the launch before writes comes early or late, too."""
    problem = Problem(name, 19, 70, 1600, 6, scaled=True, bias=torch.float32)
    expected = problem.run(sim)
    problem.check(expected)
    for seed in range(3):
        how = dict(seed=seed, mode=mode, resident=1 + seed, dependent=seed > 0)
        assert torch.equal(problem.run(sim, **how).view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("name", ["nf4", "int4", "int8 bf16"])
def test_rows_do_not_depend_on_others(sim, name):
    whole = Problem(name, 64, 40, 576, 5)
    expected = whole.run(sim)
    whole.check(expected)
    for rows in ([63], [*range(9)], [*range(5, 20)], [*range(33)]):
        some = Problem(name, len(rows), 40, 576, 5)
        some.x, some.v = whole.x[rows].contiguous(), whole.v[rows].contiguous()
        some.b = whole.b
        assert torch.equal(some.run(sim).view(torch.int16), expected[rows].view(torch.int16))


def test_nothing_to_write(sim):
    for M, N in ((0, 8), (8, 0)):
        assert Problem("int8", M, N, 16, 4).run(sim).shape == (M, N)


@pytest.mark.parametrize(
    "change",
    [dict(code=7), dict(order=2), dict(integers=True), dict(block_bytes=18), dict(rows=2), dict(number=3)],
    ids=str,
)
def test_other_codes_are_not_taken(sim, change):
    """fp8, halves of W, W8A8, blocks with their scales, scales of several rows, exponents."""
    args = Arguments(Matrix(0, 1, 64, 1), Matrix(), False, Matrix(0, 1, 8, 1), 4, 8, 64, 0)
    given = dict(code=6, order=BYTES, N=8, K=64, row=64, group=64, rows=1, groups=1, outer_group=1)
    for taken, w in ((1, Quantised(**given)), (0, Quantised(**given | change))):
        assert sim.library.sim_lora_linear_codes_takes(ctypes.byref(args), ctypes.byref(w)) == taken


def judge(name: str, sizes, dtype: torch.dtype, adapter: torch.dtype, **options) -> None:
    """The op from its arguments on, by the error that eager PyTorch makes."""
    M, N, K, R = sizes
    problem = LoRALinearProblem(M + K, M, K, N, R, dtype, adapter, scaling=2.0, base=name, **options)
    t = problem.tensors()
    c = forward(
        t["x"], drawn(name, N, K, problem.seed), t["lora_A"], t["lora_B"], bias=t.get("bias"), scaling=2.0,
        g_b=t.get("base_out_scale"), g_d=t.get("delta_out_scale"), p_d=t.get("delta_in_scale"), d=t.get("rank_scale"),
    )  # fmt: skip
    y, u, h = OPS["lora_linear_fwd"](c)
    exact = {k: v.double() for k, v in t.items()}
    absolute = {k: v.abs() for k, v in exact.items()}
    row = judged("y", y, problem.eager(t), problem.oracle(exact), problem.oracle(absolute, absolute=True))
    assert row.ok, row
    assert u.dtype == torch.float32 and u.shape == (M, R) and h.numel() == 0


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", KINDS)
def test_as_exact_as_eager(device, simulated, name, dtype):
    """One native call, whatever the kind."""
    judge(name, (6, 72, 320, 16), dtype, torch.float32, options=("bias",))
    odd = QUANTISED[name][1] == 1
    scales = "delta_in_scale", "rank_scale", "base_out_scale", "delta_out_scale"
    judge(name, (37, 35, 98 + odd, 5), dtype, dtype, options=scales)
    assert simulated.calls == 2 * ["cuda_lora_linear_forward"]


def call(name: str):
    """A forward pass over a base of that name."""
    gen = torch.Generator().manual_seed(7)
    x, A, B = (torch.randn(*shape, generator=gen).bfloat16() for shape in ((5, 64), (4, 64), (40, 4)))
    return forward(x, drawn(name, 40, 64, 7), A, B, bias=torch.ones(40))


class Subclass(torch.Tensor):
    """No plain tensor."""


@pytest.mark.parametrize("name", KINDS)
def test_tensors_that_are_not_plain(device, name):
    """Codes may be a subclass, lie apart or begin at any byte: the bits are the same."""
    c = call(name)
    codes, *rest = c.base
    expected = OPS["lora_linear_fwd"](c)[0]
    apart = torch.cat([codes, codes], dim=-1)[..., : codes.shape[-1]]
    shifted = torch.cat([codes.flatten()[:1], codes.flatten()])[1:].view(codes.shape)
    for other in (codes.as_subclass(Subclass), apart, shifted):
        assert torch.equal(OPS["lora_linear_fwd"](c._replace(base=[other, *rest]))[0], expected)


# What does not hold 40 x 64 codes and what belongs to them; W8A8 is no kind that the kernel reads.
MISFITS = {
    "nf4": [lambda b: [b[0][1:], b[1]], lambda b: [b[0], b[1].half()], lambda b: [b[0], b[1][:33]], lambda b: b[:1]],
    "nf4 nested": [lambda b: [*b[:2], b[2][1:], *b[3:]], lambda b: [*b[:3], b[3][:0], b[4]], lambda b: b[:4]],
    "int4": [lambda b: [b[0], b[1], b[2].half()], lambda b: [b[0], b[1][:, :0], b[2]], lambda b: [b[0][:, 1:], *b[1:]]],
    "int8": [lambda b: [b[0].view(torch.uint8), b[1]], lambda b: [b[0], b[1][1:]], lambda b: [b[0][1:], b[1]]],
}  # fmt: skip


@pytest.mark.parametrize("name, i", [(name, i) for name, changes in MISFITS.items() for i in range(len(changes))])
def test_nothing_runs_on_codes_that_do_not_fit(device, name, i):
    """Whatever was checked before: no kernel reads beside a tensor."""
    c = call(name)
    with pytest.raises(RuntimeError, match="takes no call like this one"):
        OPS["lora_linear_fwd"](c._replace(base=MISFITS[name][i](c.base)))


@pytest.mark.parametrize("kind", ["w8a8", "no kind"])
def test_no_kernel_runs_on_other_kinds(device, kind):
    with pytest.raises(RuntimeError, match="no kernel takes" if kind == "w8a8" else "takes no call like this one"):
        OPS["lora_linear_fwd"](call("int8")._replace(kind=kind))

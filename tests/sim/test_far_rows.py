"""Every kernel on matrices whose rows lie further apart than 32 bits count.

Rows are 2^30 elements and a little apart, and nothing but the rows exists, so an offset that is narrowed anywhere faults.
Where rows have no gaps by definition there are as many as it takes, of which the last blocks of the grid alone run.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from lora_linear_args import Arguments, Dropout, Matrix, Quantised

from peftkern.bases.codebook import NF4
from peftkern.ops.adapter_table import table_row
from peftkern.ops.dropout_mask import dropout_rows_ref, threshold

FAR = 2**30 + 8
MANY = 2**27  # rows before those that exist, of 16 or more elements each
BF16, F32 = torch.bfloat16, torch.float32
CODES = {F32: 0, BF16: 1, torch.uint8: 0, torch.int8: 0}
NO_MATRIX, NO_DROPOUT = (0, 0, 0, 1), (0, 0, 1.0)


def raw(t: torch.Tensor) -> np.ndarray:
    """The bits of a tensor."""
    return t.view(torch.int16).numpy() if t.dtype == BF16 else t.numpy()


def random(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("stride", [40, 5000, FAR])
def test_far_rows(sim, stride):
    """Rows beyond what 32 bits count: they are there, nothing is between them, and what is written beside them is seen."""
    values = np.arange(96, dtype=np.uint32).reshape(3, 32)
    for first in (0, 7):
        with sim.memory() as memory:
            rows = memory.rows(values, stride, first)
            np.testing.assert_array_equal(rows.array, values)
            out = memory.put(0 * values)
            for i in range(3):
                at = [ctypes.c_void_p(b.address + 4 * i * s) for b, s in ((rows, stride), (out, 32))]
                at[0].value += 4 * first * stride
                sim.run("sim_double", *at, 32, 0)
            np.testing.assert_array_equal(out.array, 2 * values)
    with pytest.raises(Exception, match="outside every buffer"), sim.memory() as memory:
        rows = memory.rows(values, stride)
        sim.run("sim_double", rows, ctypes.c_void_p(rows.address + 4 * (2 * stride + 1)), 32, 0)
    with pytest.raises(Exception, match="written beside a buffer"), sim.memory() as memory:
        rows = memory.rows(values[:2], stride)
        sim.run("sim_double", rows, ctypes.c_void_p(rows.address + 4), 32, 0)


@pytest.mark.parametrize("last", [0, 1, 3])
def test_the_last_blocks_of_a_grid(sim, last):
    """The others do not run."""
    with sim.memory() as memory:
        out = memory.empty(5 * 32, np.uint32)
        sim.run("sim_double", memory.put(np.ones(5 * 32, np.uint32)), out, 5 * 32, 0, last=last)
        assert (out.array == 2).tolist() == [last == 0 or i >= 32 * (5 - last) for i in range(5 * 32)]


class Operands:
    """Tensors in guarded memory, as ``Kernels`` takes them."""

    def __init__(self, memory):
        self._memory = memory

    def far(self, t: torch.Tensor, transposed: bool = False, stride: int = FAR, first: int = 0):
        """(matrix tuple, the rows): rows ``stride`` elements apart (columns with ``transposed``), as many before ``first``."""
        rows = self._memory.rows(raw(t.t().contiguous() if transposed else t.contiguous()), stride, first)
        return (rows.address, CODES[t.dtype], *((1, stride) if transposed else (stride, 1))), rows

    def put(self, t: torch.Tensor) -> int:
        """Address of a tensor without gaps."""
        return self._memory.put(raw(t), alignment=16).address

    def scratch(self, count: int, dtype=np.float32) -> int:
        return self._memory.put(np.zeros(max(count, 1), dtype)).address


@pytest.fixture
def operands(sim):
    sim.configure()
    with sim.memory() as memory:
        yield Operands(memory)


def ints(*values: int):
    return np.array(values, np.int64).ctypes


def floats(*values: float):
    return np.array(values, np.float32).ctypes


def at(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)


class Kernels:
    """Launches by the addresses of what they take, 0 for what is absent. A matrix: (address, dtype code, strides)."""

    def __init__(self, sim, operands: Operands):
        self._sim, self._operands = sim, operands

    def _count(self, name: str, *arguments) -> int:
        function = getattr(self._sim.library, name)
        function.restype = ctypes.c_int64
        return function(*arguments)

    def shrink(self, x, p, sizes, out: int, drop=NO_DROPOUT, **how) -> None:
        """``drop``: (address of the seed, threshold, scale of what is kept)."""
        self._sim.run(
            "sim_lora_shrink", ints(x[1], p[1], *sizes, x[2], *p[2:], drop[1]), floats(1.0, drop[2]), at(x[0]), at(p[0]),
            None, None, at(drop[0]), at(out), None, **how,
        )  # fmt: skip

    def row_norm(self, w, a, b, scaling: float, sizes, out: int, **how) -> None:
        partials = self._count("sim_lora_row_norm_partials", *map(ctypes.c_int64, sizes))
        self._sim.run(
            "sim_lora_row_norm", ints(w[1], *sizes, w[2], a[1], *a[2:], *b[2:], 0), at(w[0]), at(a[0]), at(b[0]),
            floats(scaling), at(out), at(self._operands.scratch(partials)), **how,
        )  # fmt: skip

    def grad(self, x, sizes, v: int, grad, p, down: int, colsum: int, **how) -> int:
        """How many partial sums there were."""
        args = (
            ints(x[1], *sizes, x[2], *grad[1:], *p[1:], 1), floats(1.0, 1.0, 1.0), at(x[0]), at(v), None, None,
            at(grad[0]), at(p[0]), None, at(down), at(colsum), None, ctypes.c_int64(0),
        )  # fmt: skip
        partials = self._count("sim_lora_grad_partials", *args)
        self._sim.run("sim_lora_grad", *args, at(self._operands.scratch(partials)), **how)
        return partials

    def linear(self, hopper: bool, x, w, out, sizes, v: int, b, a=NO_MATRIX, drop=NO_DROPOUT, multiprocessors=3, **how):
        by_row = w[2] == 1
        w = (w[0], w[1], w[3], 1) if by_row else w
        if hopper:
            counters = self._count("sim_lora_linear_counters", ctypes.c_int64(sizes[0])) if a[0] else 0
            counters = self._operands.scratch(counters, np.uint32) if counters else 0
            args = Arguments(
                Matrix(*x), Matrix(*w), by_row, Matrix(*out), *sizes, v, Matrix(*a), Matrix(*b), scaling=1.0,
                dropout=Dropout(*drop), counters=counters, multiprocessors=multiprocessors,
            )  # fmt: skip
            assert self._sim.library.sim_lora_linear_sm90_takes(ctypes.byref(args))
            self._sim.run("sim_lora_linear_sm90", ctypes.byref(args), **how)
            return
        tensors = np.array([x[0], w[0], out[0], v, b[0], 0, 0, 0, 0, drop[0]], np.uint64).ctypes
        self._sim.run(
            "sim_lora_linear_sm80",
            ints(x[1], b[1], 0, *sizes, x[2], w[2], out[2], by_row, *b[2:], drop[1], multiprocessors),
            floats(1.0, drop[2]), tensors, **how,
        )  # fmt: skip

    def linear_of_codes(self, x, w: Quantised, out, sizes, v: int, b, **how):
        args = Arguments(Matrix(*x), Matrix(), False, Matrix(*out), *sizes, v, Matrix(), Matrix(*b), scaling=1.0)
        self._sim.run("sim_lora_linear_codes", ctypes.byref(args), ctypes.byref(w), 0, **how)

    def sgmv(self, arch: int, out, x, sizes, adapter: int, addresses, src=None) -> None:
        """``sizes``: M, N, K, slots, max_rank; ``addresses``: of tensors, table, scaling, order, starts and u.

        With ``src`` a third of the tensors is one of vectors.
        """
        M, _, K, _, max_rank = sizes
        kernel = ctypes.c_int64(max_rank), CODES[BF16], arch
        partials = self._count("sim_sgmv_partials", ctypes.c_int64(M), ctypes.c_int64(K), *kernel)
        counters = self._count("sim_sgmv_counters", ctypes.c_int64(M), *kernel)
        self._sim.run(
            "sim_sgmv_add",
            ints(CODES[BF16], adapter, out[2], x[2], *sizes, 1, arch, 2, *((1, src[2]) if src else (0, 0)), 0),
            at(out[0]), at(x[0]), *map(at, addresses), at(self._operands.scratch(partials)),
            at(self._operands.scratch(counters, np.uint32)), at(src[0]) if src else None, None,
        )  # fmt: skip

    def scale_rows(self, out, x, sizes, addresses) -> None:
        """``sizes``: M, K; ``addresses``: of tensors, of which the third is one of vectors, table, order and starts."""
        M, K = sizes
        numbers = ints(CODES[BF16], 0, out[2], x[2], M, 0, K, 1, 0, 0, 90, 2, 1, 0, 0)
        self._sim.run("sim_scale_rows", numbers, at(out[0]), at(x[0]), *map(at, addresses))


@pytest.fixture
def kernels(sim, operands):
    return Kernels(sim, operands)


def close(rows, expected: torch.Tensor, dtype: torch.dtype, size: float = 1.0, transposed: bool = False) -> None:
    """One rounding to ``dtype`` beside fp32 sums; ``size`` is that of what was added up."""
    got = torch.from_numpy(np.ascontiguousarray(rows.array)).view(dtype).double()
    got = got.t() if transposed else got
    unit = {F32: 0.0, BF16: 2.0**-8}[dtype]
    assert ((got - expected).abs() <= unit * expected.abs() + 2.0**-15 * size).all()


@pytest.mark.parametrize("adapter", [F32, BF16])
@pytest.mark.parametrize("transposed", [False, True])
def test_lora_shrink(kernels, operands, transposed, adapter):
    M, C, R = 10, 40, 10
    x, p = random(M, C, dtype=BF16), random(R, C, dtype=adapter)
    out = operands.far(torch.zeros(M, R), stride=R)[1]
    kernels.shrink(operands.far(x)[0], operands.far(p, transposed)[0], (M, C, R), out.address)
    close(out, x.double() @ p.double().t(), F32, 10)


def test_lora_shrink_of_many_rows(kernels, operands):
    M, C, R = MANY + 5, 8, 16
    first, seed = M - 5 - 64, torch.tensor([11])
    x, p = random(M - first, C, dtype=BF16), random(R, C)
    out = operands.far(torch.zeros(M - first, R), stride=R, first=first)[1]
    kernels.shrink(
        operands.far(x, stride=C, first=first)[0], operands.far(p)[0], (M, C, R), out.address,
        (operands.put(seed), threshold(0.5), 2.0), last=2,
    )  # fmt: skip
    kept = 2 * x.double() * dropout_rows_ref(seed, torch.arange(first, M), C, 0.5)
    close(out, kept @ p.double().t(), F32, 10)


@pytest.mark.parametrize("adapter", [F32, BF16])
@pytest.mark.parametrize("transposed", [False, True])
def test_lora_row_norm(kernels, operands, transposed, adapter):
    N, K, R = 10, 72, 18
    w, a, b = random(N, K, dtype=BF16), random(R, K, dtype=adapter), random(N, R, dtype=adapter)
    out = operands.far(torch.zeros(N, 1), stride=1)[1]
    kernels.row_norm(
        operands.far(w)[0], operands.far(a, transposed)[0], operands.far(b, transposed)[0], 0.5, (N, K, R), out.address
    )
    close(out, (w.double() + 0.5 * b.double() @ a.double()).norm(dim=1, keepdim=True), F32)


def test_lora_row_norm_walks_far(kernels, operands):
    """A block that goes on to the next 128 rows."""
    first, N, K, R = 135 * 256, 135 * 256 + 250, 8, 2
    w, a, b = random(N - first, K, dtype=BF16), random(R, K), random(N - first, R)
    out = operands.far(torch.zeros(N - first, 1), stride=1, first=first)[1]
    kernels.row_norm(
        operands.far(w, stride=2**25 + 8, first=first)[0], operands.far(a)[0],
        operands.far(b, stride=2**25, first=first)[0], 1.0, (N, K, R), out.address, last=1,
    )  # fmt: skip
    close(out, (w.double() + b.double() @ a.double()).norm(dim=1, keepdim=True), F32)


@pytest.mark.parametrize("M, stride", [(34, FAR), (200, FAR), (34, FAR + 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_lora_grad(kernels, operands, transposed, M, stride):
    """One range of rows or two, so that the second launch makes the gradient; copied 16 bytes at a time or not."""
    C, R = 24, 18
    x, v, p = random(M, C, dtype=BF16), random(M, R), random(R, C)
    down, colsum = operands.far(torch.zeros(M, R), stride=R)[1], operands.far(torch.zeros(1, C), stride=C)[1]
    to, grad = operands.far(torch.zeros(R, C), transposed)
    partials = kernels.grad(
        operands.far(x, stride=stride)[0], (M, C, R), operands.put(v), to, operands.far(p, transposed)[0], down.address,
        colsum.address,
    )  # fmt: skip
    assert (partials > 0) == (M > 192)
    close(grad, v.double().t() @ x.double(), F32, 20, transposed)
    close(down, x.double() @ p.double().t(), F32, 10)
    close(colsum, x.double().sum(0, keepdim=True), F32, 20)


def test_lora_grad_of_many_ranks(kernels, operands):
    """More than anyone has: v and `down`, which have no gaps, are far then. The last 32 ranks alone are worked on."""
    M, C, R, count = 34, 8, MANY + 32, 32
    x, v, p = random(M, C, dtype=BF16), random(M, count), random(count, C)
    last = {"stride": C, "first": R - count}
    down, before = operands.far(torch.zeros(M, count), stride=R)[1], 4 * (R - count)
    to, grad = operands.far(torch.zeros(count, C), **last)
    partials = kernels.grad(
        operands.far(x)[0], (M, C, R), operands.far(v, stride=R)[0][0] - before, to, operands.far(p, **last)[0],
        down.address - before, 0, last=1,
    )  # fmt: skip
    assert partials == 0
    close(grad, v.double().t() @ x.double(), F32, 20)
    close(down, x.double() @ p.double().t(), F32, 10)


@pytest.mark.parametrize("adapter", [F32, BF16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("hopper, stride", [(False, FAR), (False, FAR + 1), (True, FAR)])
def test_lora_linear(kernels, operands, hopper, stride, transposed, adapter):
    """Two tiles of rows, columns and depth; copied 16 bytes at a time or not."""
    M, N, K, R = 70, 72, 72, 5
    x, w, v, b = random(M, K, dtype=BF16), random(N, K, dtype=BF16), random(M, R), random(N, R, dtype=adapter)
    to, out = operands.far(torch.zeros(M, N, dtype=BF16), stride=stride)
    kernels.linear(
        hopper, operands.far(x, stride=stride)[0], operands.far(w, transposed, stride)[0], to, (M, N, K, R),
        operands.put(v), operands.far(b, transposed, stride)[0],
    )  # fmt: skip
    close(out, x.double() @ w.double().t() + v.double() @ b.double().t(), BF16, 20)


def test_lora_linear_makes_v(kernels, operands):
    M, N, K, R = 70, 24, 72, 20
    x, w, a, b = random(M, K, dtype=BF16), random(N, K, dtype=BF16), random(R, K), random(N, R)
    v = operands.far(torch.zeros(M, R), stride=R)[1]
    to, out = operands.far(torch.zeros(M, N, dtype=BF16))
    kernels.linear(
        True, operands.far(x)[0], operands.far(w)[0], to, (M, N, K, R), v.address, operands.far(b)[0],
        a=operands.far(a)[0],
    )  # fmt: skip
    low = x.double() @ a.double().t()
    close(v, low, F32, 10)
    close(out, x.double() @ w.double().t() + low @ b.double().t(), BF16, 100)


@pytest.mark.parametrize("hopper", [False, True])
def test_lora_linear_of_many_rows(kernels, operands, hopper):
    M, N, K, R = MANY + 5, 24, 8, 16
    seed, there = torch.tensor([5]), {"first": MANY}
    x, w, v, b = random(5, K, dtype=BF16), random(N, K, dtype=BF16), random(5, R), random(N, R)
    to, out = operands.far(torch.zeros(5, N, dtype=BF16), stride=N, **there)
    kernels.linear(
        hopper, operands.far(x, stride=K, **there)[0], operands.far(w)[0], to, (M, N, K, R),
        operands.far(v, stride=R, **there)[0][0], operands.far(b)[0], drop=(operands.put(seed), threshold(0.5), 2.0),
        multiprocessors=2**22, last=1,
    )  # fmt: skip
    kept = 2 * dropout_rows_ref(seed, torch.arange(MANY, M), N, 0.5)
    close(out, x.double() @ w.double().t() + kept * (v.double() @ b.double().t()), BF16, 20)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind, row", [("int8", FAR + 8), ("int8", FAR), ("int4", 2 * FAR + 16), ("int4", 2 * FAR)])
def test_lora_linear_of_codes(kernels, operands, kind, row, transposed):
    """Rows of W, too; 16 bytes at a time or not."""
    M, N, K, R = 10, 36, 96, 5
    x, v, b = random(M, K, dtype=BF16), random(M, R), random(N, R)
    q = torch.randint(-8, 8, (N, K))
    scales, zeros = 0.1 + torch.rand(N), torch.zeros(N)
    held = (q.to(torch.int8), 1) if kind == "int8" else (((q[:, ::2] & 15) | (q[:, 1::2] & 15) << 4).to(torch.uint8), 2)
    code, order = (6, 5) if kind == "int8" else (4, 1)
    w = Quantised(code, order, N, K, operands.far(held[0], stride=row // held[1])[0][0], row, group=K, rows=1, groups=1)
    w.scales, w.outer_group = operands.put(scales), 1
    w.zeros = operands.put(zeros) if kind == "int4" else None
    to, out = operands.far(torch.zeros(M, N, dtype=BF16))
    kernels.linear_of_codes(operands.far(x)[0], w, to, (M, N, K, R), operands.put(v), operands.far(b, transposed)[0])
    weight = (q * scales[:, None]).double() if kind == "int8" else (q * scales[:, None]).to(BF16).double()
    close(out, x.double() @ weight.t() + v.double() @ b.double().t(), BF16, 500)


def test_lora_linear_of_many_codes(kernels, operands):
    """Of nf4 there are no gaps between rows of W: it has as many as it takes, and so have scales, b and columns of out."""
    first, count, M, K, R = MANY, 40, 3, 64, 2
    N, there = first + count, {"first": first}
    x, v, b = random(M, K, dtype=BF16), random(M, R), random(count, R)
    q, scales = torch.randint(0, 16, (count, K), dtype=torch.uint8), 0.1 + torch.rand(count, 1)
    codes = operands.far(q[:, ::2] << 4 | q[:, 1::2], stride=K // 2, **there)[0][0]
    w = Quantised(0, 0, N, K, codes, K, flat=True, group=K, rows=1, groups=1, outer_group=1)
    w.scales = operands.far(scales, stride=1, **there)[0][0]
    to, out = operands.far(torch.zeros(M, count, dtype=BF16), stride=N + 8)
    kernels.linear_of_codes(
        operands.far(x)[0], w, (to[0] - 2 * first, *to[1:]), (M, N, K, R), operands.put(v),
        operands.far(b, stride=R, **there)[0], last=2,
    )  # fmt: skip
    weight = (torch.tensor(NF4)[q.long()] * scales).to(BF16).double()
    close(out, x.double() @ weight.t() + v.double() @ b.double().t(), BF16, 50)


@pytest.mark.parametrize("adapter", [F32, BF16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("arch", [80, 90])
def test_sgmv(kernels, operands, arch, transposed, adapter):
    """Rows with large numbers, so that u, which has no gaps, is far too."""
    M, N, K, rank, max_rank = 20, 72, 72, 18, 20
    x, y = random(M, K, dtype=BF16), random(M, N, dtype=BF16)
    a, b = random(rank, K, dtype=adapter), random(N, rank, dtype=adapter)
    # 32-bit row numbers: as large as addresses allow, 2^47 bytes in all.
    first, stride = MANY, 2**17 + 8
    to, out = operands.far(y, stride=stride, first=first)
    u = operands.far(torch.full((M, max_rank), 7.0), stride=max_rank, first=first)[1]
    (of_a, _, a_row, _), (of_b, _, b_n, b_r) = operands.far(a)[0], operands.far(b, transposed)[0]
    # Where an adapter lies in its tensor is far, too.
    far, size = 2**33, a.element_size()
    table = torch.tensor([[0, rank, 0, far, a_row, 1, far, b_n, b_r, 0]])
    tensors = torch.tensor([of_a - far * size, of_b - far * size])
    order, starts = torch.arange(first, first + M, dtype=torch.int32), torch.tensor([0, M, M, M], dtype=torch.int32)
    parts = tensors, table, torch.tensor([0.5]), order, starts
    kernels.sgmv(
        arch,
        to,
        operands.far(x, stride=stride, first=first)[0],
        (M, N, K, 1, max_rank),
        CODES[adapter],
        (*map(operands.put, parts), u.address if arch == 90 else 0),
    )
    low = x.double() @ a.double().t()
    close(out, y.double() + 0.5 * low @ b.double().t(), BF16, 100)
    if arch == 90:
        close(u, torch.nn.functional.pad(low, (0, max_rank - rank)), F32, 10)


@pytest.mark.parametrize("rank", [0, 18])
def test_vectors_of_adapters(kernels, operands, rank):
    """All there are in one tensor, far from its begin; the base product in far rows, too."""
    M, N, K, first, stride, far = 20, 72, 72, MANY, 2**17 + 8, 2**33
    x, h, a, b = random(M, K, dtype=BF16), random(M, N, dtype=BF16), random(rank, K), random(N, rank)
    rows = dict(stride=stride, first=first)
    to, out = operands.far(torch.zeros(M, N, dtype=BF16), **rows)
    of_x, of_h = operands.far(x, **rows)[0], operands.far(h, **rows)[0]
    sizes = dict(d=rank, p_b=K, p_d=K, g_b=N, g_d=N, beta=N)
    v, places, begin = {symbol: random(size) for symbol, size in sizes.items()}, {}, 0
    for symbol, size in sizes.items():
        places[symbol] = 0, far + begin
        begin += size
    table = torch.tensor([table_row(0, rank, 0, 0, K, 1, 0, rank, 1, 0, **places)])
    vectors = operands.put(torch.cat(list(v.values())))
    tensors = torch.tensor([operands.put(a), operands.put(b), vectors - 4 * far])
    order, starts = torch.arange(first, first + M, dtype=torch.int32), torch.tensor([0, M, M, M], dtype=torch.int32)
    addresses = [operands.put(t) for t in (tensors, table, torch.tensor([0.5]), order, starts)]
    kernels.sgmv(90, to, of_x, (M, N, K, 1, rank), CODES[F32], (*addresses, 0), of_h)
    v = {symbol: vector.double() for symbol, vector in v.items()}
    low = 0.5 * v["d"] * ((x.double() * v["p_d"]) @ a.double().t())
    close(out, v["g_b"] * h.double() + v["g_d"] * (low @ b.double().t()) + v["beta"], BF16, 1000)
    kernels.scale_rows(to, of_x, (M, K), (*addresses[:2], *addresses[3:]))
    close(out, v["p_b"] * x.double(), BF16)


def test_dropout_mask(sim, operands):
    """The last block of 256 groups of columns has those of three rows."""
    M, K, seed = MANY + 3, 40, torch.tensor([-9])
    out = operands.far(torch.zeros(3, K, dtype=torch.uint8), stride=K, first=MANY)[1]
    sim.configure(last=1)
    sim.module.cuda_dropout_mask(operands.put(seed), M, K, threshold(0.3), out.address, 0)
    expected = dropout_rows_ref(seed, torch.arange(MANY, M), K, 0.3)
    assert torch.equal(torch.from_numpy(out.array.copy()).bool(), expected)

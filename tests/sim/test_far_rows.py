"""Every kernel on matrices whose rows lie further apart than 32 bits count.

Rows are 2^30 elements and a little apart, and nothing but the rows exists, so an offset that is narrowed anywhere faults.
Where rows have no gaps by definition there are as many as it takes, of which the last blocks of the grid alone run.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from peftkern.ops.dropout_mask import dropout_rows_ref, threshold

FAR = 2**30 + 8
MANY = 2**27  # rows before those that exist, of 16 or more elements each
BF16, F32 = torch.bfloat16, torch.float32
CODES = {F32: 0, BF16: 1, torch.uint8: 0}
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
    """Tensors in guarded memory, as the bindings take them."""

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


def close(rows, expected: torch.Tensor, dtype: torch.dtype, size: float = 1.0, transposed: bool = False) -> None:
    """One rounding to ``dtype`` beside fp32 sums; ``size`` is that of what was added up."""
    got = torch.from_numpy(np.ascontiguousarray(rows.array)).view(dtype).double()
    got = got.t() if transposed else got
    unit = {F32: 0.0, BF16: 2.0**-8}[dtype]
    assert ((got - expected).abs() <= unit * expected.abs() + 2.0**-15 * size).all()


@pytest.mark.parametrize("adapter", [F32, BF16])
@pytest.mark.parametrize("transposed", [False, True])
def test_lora_shrink(sim, operands, transposed, adapter):
    M, C, R = 10, 40, 10
    x, p = random(M, C, dtype=BF16), random(R, C, dtype=adapter)
    out = operands.far(torch.zeros(M, R), stride=R)[1]
    sim.module.cuda_lora_shrink(
        operands.far(x)[0], operands.far(p, transposed)[0], 0, 0, 1.0, NO_DROPOUT, M, C, R, out.address, 0, 0
    )
    close(out, x.double() @ p.double().t(), F32, 10)


def test_lora_shrink_of_many_rows(sim, operands):
    M, C, R = MANY + 5, 8, 16
    first, seed = M - 5 - 64, torch.tensor([11])
    x, p = random(M - first, C, dtype=BF16), random(R, C)
    out = operands.far(torch.zeros(M - first, R), stride=R, first=first)[1]
    sim.configure(last=2)
    sim.module.cuda_lora_shrink(
        operands.far(x, stride=C, first=first)[0], operands.far(p)[0], 0, 0, 1.0,
        (operands.put(seed), threshold(0.5), 2.0), M, C, R, out.address, 0, 0,
    )  # fmt: skip
    kept = 2 * x.double() * dropout_rows_ref(seed, torch.arange(first, M), C, 0.5)
    close(out, kept @ p.double().t(), F32, 10)


@pytest.mark.parametrize("adapter", [F32, BF16])
@pytest.mark.parametrize("transposed", [False, True])
def test_lora_row_norm(sim, operands, transposed, adapter):
    N, K, R = 10, 72, 18
    w, a, b = random(N, K, dtype=BF16), random(R, K, dtype=adapter), random(N, R, dtype=adapter)
    out = operands.far(torch.zeros(N, 1), stride=1)[1]
    sim.module.cuda_lora_row_norm(
        operands.far(w)[0], operands.far(a, transposed)[0], operands.far(b, transposed)[0], 0.5, N, K, R, out.address,
        operands.scratch(sim.module.cuda_lora_row_norm_partials(N, K, R)), False, 0,
    )  # fmt: skip
    close(out, (w.double() + 0.5 * b.double() @ a.double()).norm(dim=1, keepdim=True), F32)


def test_lora_row_norm_walks_far(sim, operands):
    """A block that goes on to the next 128 rows."""
    first, N, K, R = 135 * 256, 135 * 256 + 250, 8, 2
    w, a, b = random(N - first, K, dtype=BF16), random(R, K), random(N - first, R)
    out = operands.far(torch.zeros(N - first, 1), stride=1, first=first)[1]
    sim.configure(last=1)
    sim.module.cuda_lora_row_norm(
        operands.far(w, stride=2**25 + 8, first=first)[0], operands.far(a)[0],
        operands.far(b, stride=2**25, first=first)[0], 1.0, N, K, R, out.address, 0, False, 0,
    )  # fmt: skip
    close(out, (w.double() + b.double() @ a.double()).norm(dim=1, keepdim=True), F32)


@pytest.mark.parametrize("M, stride", [(34, FAR), (200, FAR), (34, FAR + 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_lora_grad(sim, operands, transposed, M, stride):
    """One range of rows or two, so that the second launch makes the gradient; copied 16 bytes at a time or not."""
    C, R = 24, 18
    x, v, p = random(M, C, dtype=BF16), random(M, R), random(R, C)
    down, colsum = operands.far(torch.zeros(M, R), stride=R)[1], operands.far(torch.zeros(1, C), stride=C)[1]
    to, grad = operands.far(torch.zeros(R, C), transposed)
    args = (
        operands.far(x, stride=stride)[0], NO_DROPOUT, M, C, R, operands.put(v), 0, 1.0, 0, to,
        operands.far(p, transposed)[0], 0, 1.0, down.address, colsum.address,
    )  # fmt: skip
    partial = sim.module.cuda_lora_grad_partials(*args)
    assert (partial > 0) == (M > 192)
    sim.module.cuda_lora_grad(*args, operands.scratch(partial), True, 0)
    close(grad, v.double().t() @ x.double(), F32, 20, transposed)
    close(down, x.double() @ p.double().t(), F32, 10)
    close(colsum, x.double().sum(0, keepdim=True), F32, 20)


def test_lora_grad_of_many_ranks(sim, operands):
    """More than anyone has: v and `down`, which have no gaps, are far then. The last 32 ranks alone are worked on."""
    M, C, R, count = 34, 8, MANY + 32, 32
    x, v, p = random(M, C, dtype=BF16), random(M, count), random(count, C)
    last = {"stride": C, "first": R - count}
    down, before = operands.far(torch.zeros(M, count), stride=R)[1], 4 * (R - count)
    to, grad = operands.far(torch.zeros(count, C), **last)
    sim.configure(last=1)
    sim.module.cuda_lora_grad(
        operands.far(x)[0], NO_DROPOUT, M, C, R, operands.far(v, stride=R)[0][0] - before, 0, 1.0, 0, to,
        operands.far(p, **last)[0], 0, 1.0, down.address - before, 0, 0, False, 0,
    )  # fmt: skip
    close(grad, v.double().t() @ x.double(), F32, 20)
    close(down, x.double() @ p.double().t(), F32, 10)


def linear(sim, operands, hopper, x, w, out, v, b, *, a=NO_MATRIX, drop=NO_DROPOUT, sizes, multiprocessors=3):
    by_row = w[2] == 1
    counters = operands.scratch(sim.module.cuda_lora_linear_counters(sizes[0]), np.uint32) if a[0] else 0
    w = (w[0], w[1], w[3], 1) if by_row else w
    assert sim.module.cuda_lora_linear(
        hopper, x, w, by_row, out, *sizes, v, a, b, 1.0, 0, 0, 0, 0, 0, drop, counters, multiprocessors, 0
    )


@pytest.mark.parametrize("adapter", [F32, BF16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("hopper, stride", [(False, FAR), (False, FAR + 1), (True, FAR)])
def test_lora_linear(sim, operands, hopper, stride, transposed, adapter):
    """Two tiles of rows, columns and depth; copied 16 bytes at a time or not."""
    M, N, K, R = 70, 72, 72, 5
    x, w, v, b = random(M, K, dtype=BF16), random(N, K, dtype=BF16), random(M, R), random(N, R, dtype=adapter)
    to, out = operands.far(torch.zeros(M, N, dtype=BF16), stride=stride)
    linear(
        sim, operands, hopper, operands.far(x, stride=stride)[0], operands.far(w, transposed, stride)[0], to,
        operands.put(v), operands.far(b, transposed, stride)[0], sizes=(M, N, K, R),
    )  # fmt: skip
    close(out, x.double() @ w.double().t() + v.double() @ b.double().t(), BF16, 20)


def test_lora_linear_makes_v(sim, operands):
    M, N, K, R = 70, 24, 72, 20
    x, w, a, b = random(M, K, dtype=BF16), random(N, K, dtype=BF16), random(R, K), random(N, R)
    v = operands.far(torch.zeros(M, R), stride=R)[1]
    to, out = operands.far(torch.zeros(M, N, dtype=BF16))
    linear(
        sim, operands, True, operands.far(x)[0], operands.far(w)[0], to, v.address, operands.far(b)[0],
        a=operands.far(a)[0], sizes=(M, N, K, R),
    )  # fmt: skip
    low = x.double() @ a.double().t()
    close(v, low, F32, 10)
    close(out, x.double() @ w.double().t() + low @ b.double().t(), BF16, 100)


@pytest.mark.parametrize("hopper", [False, True])
def test_lora_linear_of_many_rows(sim, operands, hopper):
    M, N, K, R = MANY + 5, 24, 8, 16
    seed, there = torch.tensor([5]), {"first": MANY}
    x, w, v, b = random(5, K, dtype=BF16), random(N, K, dtype=BF16), random(5, R), random(N, R)
    to, out = operands.far(torch.zeros(5, N, dtype=BF16), stride=N, **there)
    sim.configure(last=1)
    linear(
        sim, operands, hopper, operands.far(x, stride=K, **there)[0], operands.far(w)[0], to,
        operands.far(v, stride=R, **there)[0][0], operands.far(b)[0],
        drop=(operands.put(seed), threshold(0.5), 2.0), sizes=(M, N, K, R), multiprocessors=2**22,
    )  # fmt: skip
    kept = 2 * dropout_rows_ref(seed, torch.arange(MANY, M), N, 0.5)
    close(out, x.double() @ w.double().t() + kept * (v.double() @ b.double().t()), BF16, 20)


@pytest.mark.parametrize("adapter", [F32, BF16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("arch", [80, 90])
def test_sgmv(sim, operands, arch, transposed, adapter):
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
    kernel = max_rank, CODES[BF16], arch
    sim.module.cuda_sgmv_add(
        to, operands.far(x, stride=stride, first=first)[0], M, N, K, CODES[adapter], operands.put(tensors),
        operands.put(table), 1, max_rank, operands.put(torch.tensor([0.5])), operands.put(order), operands.put(starts),
        u.address if arch == 90 else 0, operands.scratch(sim.module.cuda_sgmv_partials(M, K, *kernel)),
        operands.scratch(sim.module.cuda_sgmv_counters(M, *kernel), np.uint32), True, arch, 0,
    )  # fmt: skip
    low = x.double() @ a.double().t()
    close(out, y.double() + 0.5 * low @ b.double().t(), BF16, 100)
    if arch == 90:
        close(u, torch.nn.functional.pad(low, (0, max_rank - rank)), F32, 10)


def test_dropout_mask(sim, operands):
    """The last block of 256 groups of columns has those of three rows."""
    M, K, seed = MANY + 3, 40, torch.tensor([-9])
    out = operands.far(torch.zeros(3, K, dtype=torch.uint8), stride=K, first=MANY)[1]
    sim.configure(last=1)
    sim.module.cuda_dropout_mask(operands.put(seed), M, K, threshold(0.3), out.address, 0)
    expected = dropout_rows_ref(seed, torch.arange(MANY, M), K, 0.3)
    assert torch.equal(torch.from_numpy(out.array.copy()).bool(), expected)

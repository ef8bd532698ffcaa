"""The C++ kernels of the low-rank branch against fp64: every level that runs here, every dtype, ragged sizes.

Outputs start as NaN inside guard bands; a NaN sits in the input wherever dropout drops.
"""

from __future__ import annotations

import kernel_calls
import pytest
import torch
from torch import Tensor

from peftkern.backends import cpu
from peftkern.backends.cpu import native as cpu_native
from peftkern.problem import Problem
from peftkern.settings import Settings

pytestmark = pytest.mark.skipif(cpu_native._C is None, reason="the C++ extension is not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative distance from a value to its rounding, at most.
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FP32 = HALF_ULP[torch.float32]

# Rows, columns, rank: around the widths of vectors, register blocks and tiles.
SIZES = (
    (1, 1, 1), (2, 7, 3), (3, 8, 4), (5, 17, 2), (7, 33, 5), (6, 64, 8), (25, 255, 16), (24, 512, 4),
    (49, 513, 17), (131, 1041, 13), (300, 97, 65), (23, 79, 300), (1, 1500, 9), (700, 40, 1),
)  # fmt: skip
P = 0.3
SEED = -0x1234_5678_9ABC_DEF1


def dropout() -> kernel_calls.Dropout:
    return kernel_calls.Dropout.of(P, torch.tensor([SEED]))


@pytest.fixture
def keep_mask(numpy_keep):
    return lambda M, C: torch.from_numpy(numpy_keep(SEED & (2**64 - 1), range(M), range(C), P))


def make_input(M: int, C: int, dtype: torch.dtype, layout: str, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """(what the kernel gets, its values in fp64 with dropped elements zero)."""
    t = torch.randn(M, C).to(dtype)
    exact = t.double()
    if keep is not None:
        exact = torch.where(keep, exact, 0.0)
        t = torch.where(keep, t, torch.tensor(float("nan"), dtype=dtype))
    if layout == "row_gap":
        t = torch.nn.functional.pad(t, (0, 5), value=float("nan"))[:, :C]
    elif layout == "transposed":
        t = t.t().contiguous().t()
    elif layout == "reversed_view":
        t = torch.stack([t, torch.full_like(t, float("nan"))], dim=2)[:, :, 0]
    return t, exact


def close(got: Tensor, exact: Tensor, magnitude: Tensor, steps: float = 8.0) -> None:
    """|got - exact| within ``steps`` fp32 half-ulps of the sum of absolute values, and one rounding of got's dtype."""
    bound = steps * FP32 * magnitude + HALF_ULP[got.dtype] * exact.abs() + 2.0**-140
    if got.dtype == torch.float16:
        bound = bound + 2.0**-25
    error = (got.double() - exact).abs()
    assert bool((error <= bound).all()), f"error is {float((error / bound).max()):.3g} times its bound"


@pytest.mark.parametrize("drop", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("contiguous", "row_gap", "transposed", "reversed_view"))
def test_reduce(level, guarded, keep_mask, dtype, layout, drop):
    sizes = SIZES if layout == "contiguous" else SIZES[3:10:3]
    for M, C, R in sizes:
        t, exact = make_input(M, C, dtype, layout, keep_mask(M, C) if drop else None)
        A, v = torch.randn(R, C), torch.randn(M, R)
        out, g, colsum = guarded(M, R), guarded(R, C), guarded(C)
        kernel_calls.reduce(
            t, dropout=dropout() if drop else kernel_calls.NO_DROPOUT, p=kernel_calls.panel(A), out=out.out, alpha_dot=0.7,
            v=v, g=g.out, alpha_outer=-1.3, colsum=colsum.out,
        )  # fmt: skip
        size, Ad, vd = exact.abs(), A.double(), v.double()
        close(out.check(), 0.7 * exact @ Ad.t(), size @ Ad.abs().t())
        close(g.check(), -1.3 * vd.t() @ exact, 1.3 * vd.abs().t() @ size)
        close(colsum.check(), exact.sum(0), size.sum(0))


def test_reduce_parts_have_the_bits_of_the_whole(level):
    """Any subset of the three results, computed alone, equals what the fused pass gives."""
    M, C, R = 301, 533, 7
    t, A, v = torch.randn(M, C).bfloat16(), torch.randn(R, C), torch.randn(M, R)
    p = kernel_calls.panel(A)

    def run(**wanted):
        out, g, colsum = torch.empty(M, R), torch.empty(R, C), torch.empty(C)
        arguments = dict(p=p, out=out, v=v, g=g, colsum=colsum)
        kernel_calls.reduce(t, **{k: arguments[k] for k in wanted})
        return out, g, colsum

    whole = run(p=1, out=1, v=1, g=1, colsum=1)
    assert torch.equal(run(p=1, out=1)[0], whole[0])
    assert torch.equal(run(v=1, g=1)[1], whole[1])
    assert torch.equal(run(v=1, g=1, colsum=1)[1], whole[1])


@pytest.mark.parametrize("drop", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ("in_place", "panel", "none"))
def test_expand(level, guarded, keep_mask, dtype, source, drop):
    for number, (M, C, R) in enumerate(SIZES):
        scale, bias = (torch.randn(C), torch.randn(C)) if number % 2 else (None, None)
        base = torch.randn(M, C).to(torch.float32 if source == "panel" else dtype)
        v, A = torch.randn(M, R), torch.randn(R, C)
        out = guarded(M, C, dtype=dtype, row_gap=number % 3)
        src = {"in_place": out.out, "panel": base, "none": None}[source]
        if source == "in_place":
            out.out.copy_(base)
        kernel_calls.expand(
            out.out, src=src, v=v, p=kernel_calls.panel(A), alpha=0.6, base_scale=scale, bias=bias,
            dropout=dropout() if drop else kernel_calls.NO_DROPOUT,
        )  # fmt: skip
        delta, size = 0.6 * v.double() @ A.double(), v.double().abs() @ A.double().abs()
        if drop:
            keep = keep_mask(M, C)
            delta, size = torch.where(keep, delta, 0.0), torch.where(keep, size, 0.0)
        exact = torch.zeros(M, C, dtype=torch.float64)
        if source != "none":
            exact = base.double() * (scale.double() if scale is not None else 1.0)
        size = size + exact.abs()
        if bias is not None:
            exact, size = exact + bias.double(), size + bias.double().abs()
        close(out.check(), exact + delta, size)


def test_expand_on_blocks_has_the_bits_of_the_whole(level):
    M, C, R = 61, 700, 11
    base, v, p = torch.randn(M, C), torch.randn(M, R), kernel_calls.panel(torch.randn(R, C))
    scale, bias = torch.randn(C), torch.randn(C)
    whole = torch.empty(M, C).bfloat16()
    kw = dict(v=v, p=p, dropout=dropout(), base_scale=scale, bias=bias)
    kernel_calls.expand(whole, src=base, **kw)
    parts = torch.full_like(whole, float("nan"))
    for r0, r1 in ((0, 1), (1, 8), (8, 11), (11, 61)):
        for c0, c1 in ((0, 16), (16, 304), (304, 700)):
            kernel_calls.expand(parts[r0:r1, c0:c1], src=base[r0:r1, c0:c1].clone(), row0=r0, col0=c0, **kw)
    assert torch.equal(parts, whole)
    with pytest.raises(ValueError, match="col0 is 8"):
        kernel_calls.expand(parts[:, 8:], src=None, col0=8, **kw)


def test_expand_rank_zero_only_scales(level, guarded):
    base, scale, bias = torch.randn(9, 83), torch.randn(83), torch.randn(83)
    out = guarded(9, 83, dtype=torch.bfloat16)
    kernel_calls.expand(out.out, src=base, v=torch.empty(9, 0), p=torch.empty(0, 96), base_scale=scale, bias=bias)
    assert torch.equal(out.check(), (base * scale + bias).bfloat16())
    negative = torch.full((2, 5), -0.0)
    kernel_calls.expand(negative, src=negative, v=torch.empty(2, 0), p=torch.empty(0, 16))
    assert bool(torch.signbit(negative).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_row_depend_on_nothing_else(level, dtype):
    """Not on the other rows, their number, the row's place, or the number of threads."""
    M, C, R = 75, 1039, 18
    t, p = torch.randn(M, C).to(dtype), kernel_calls.panel(torch.randn(R, C))

    def branch(rows: Tensor) -> tuple[Tensor, Tensor]:
        u, y = torch.empty(len(rows), R), torch.empty(len(rows), C, dtype=dtype)
        kernel_calls.reduce(rows, p=p, out=u)
        kernel_calls.expand(y, src=rows, v=u, p=p)
        return u, y

    u, y = branch(t)
    for start, stop in ((0, 1), (3, 5), (3, 6), (7, 11), (20, 27), (1, 75)):
        part_u, part_y = branch(t[start:stop])
        assert torch.equal(part_u, u[start:stop]) and torch.equal(part_y, y[start:stop])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(branch(t), (u, y)))


def test_sums_over_rows_do_not_depend_on_threads(level):
    M, C, R = 1000, 333, 6
    t, v = torch.randn(M, C).half(), torch.randn(M, R)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        g, colsum, dots = torch.empty(R, C), torch.empty(C), torch.empty(C)
        kernel_calls.reduce(t, v=v, g=g, colsum=colsum)
        kernel_calls.column_dot(t, t, dots)
        return [g, colsum, dots]

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(2)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_column_dot(level, guarded, dtype):
    for M, C, _ in SIZES:
        a, exact = make_input(M, C, dtype, "transposed" if M % 2 else "contiguous", None)
        b = torch.randn(M, C)
        out = guarded(C)
        kernel_calls.column_dot(a, b, out.out)
        once = out.out.clone()
        kernel_calls.column_dot(a, b, out.out, accumulate=True)
        twice = out.check()
        close(once, (exact * b.double()).sum(0), (exact * b.double()).abs().sum(0))
        assert torch.equal(twice, once + once)


@pytest.mark.parametrize("dtype", DTYPES)
def test_panel_and_scale_copy(level, guarded, dtype):
    for R, C in ((1, 1), (3, 17), (16, 64), (65, 130), (130, 65), (7, 5000)):
        source = torch.randn(C, R).to(dtype).t()
        rows, cols = torch.randn(R), torch.randn(C)
        packed = kernel_calls.panel(source, alpha=1.5, row_scale=rows, col_scale=cols)
        exact = 1.5 * rows[:, None].double() * cols.double() * source.double()
        assert packed.shape[1] % 16 == 0 and not packed[:, C:].any()
        assert bool(((packed[:, :C].double() - exact).abs() <= 3 * FP32 * exact.abs()).all())
        back = guarded(C, R, dtype=dtype)
        kernel_calls.scale_copy(packed[:, :C], back.out.t())
        assert torch.equal(back.check(), packed[:, :C].t().to(dtype))


def test_a_ready_panel_is_not_copied():
    ready = torch.randn(4, 32)
    assert kernel_calls.panel(ready) is ready
    assert kernel_calls.panel(torch.randn(4, 31)).shape == (4, 32)
    assert kernel_calls.panel(torch.randn(32, 4).t()).is_contiguous()


def test_bindings_reject_what_would_touch_foreign_memory():
    C = cpu_native._C
    t, p, out = torch.randn(4, 20), torch.randn(2, 32), torch.empty(4, 2)
    good = dict(row=20, col=1, M=4, C=20, R=2, seed=0, threshold=0, ldp=32, alpha_dot=1.0, v=0, alpha_outer=1.0, g=0,
                colsum=0, threads=1, dtype=0, p=p.data_ptr(), out=out.data_ptr())  # fmt: skip
    good["in"] = t.data_ptr()
    C.lora_reduce(**good)
    for bad in ({"in": 0}, {"M": -1}, {"dtype": 3}, {"ldp": 20}, {"out": 0}, {"threads": 0}, {"R": -1}):
        with pytest.raises(ValueError):
            C.lora_reduce(**(good | bad))
    with pytest.raises(ValueError, match="no level"):
        C.set_isa("avx1024")
    with pytest.raises(ValueError, match="null"):
        C.dropout_mask(1, 5, 3, 3, 0, 1)


def test_backend_states_its_limits(monkeypatch):
    problem = Problem("lora_linear_fwd", "cpu", "AVX2", torch.float64, torch.float64, 1, 1, 1, 1)
    assert "float64" in cpu.decline(problem, Settings())
    assert cpu.unavailable(Settings()) is None
    monkeypatch.setattr(cpu_native, "_C", None)
    assert "C++" in cpu.unavailable(Settings())

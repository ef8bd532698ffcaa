"""The base product on CPU: every candidate and instruction set against fp64, its scratch, and what its bits depend on.

No half-precision product of torch runs here beyond a few dozen rows and columns: on some CPUs it takes minutes. The
comparator multiplies the fp32 values of half-precision operands and rounds, which is what a good native product does.
"""

from __future__ import annotations

import pytest
import torch
from kernel_calls import base_product, forward
from torch import Tensor

from peftkern.backends.cpu import native as cpu_native
from peftkern.bases.base import Base
from peftkern.dispatch.cpu_base import Cpu, choose_kind, this_cpu
from peftkern.dispatch.cpu_table import Product
from peftkern.settings import Settings

pytestmark = pytest.mark.skipif(cpu_native._C is None, reason="the C++ extension is not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Whatever the layer, the scratch of one product stays under this; few is taken up to so many floats of copies of a.
SCRATCH_BYTES, FEW_SCRATCH = 64 << 20, 4 << 20
SIZES = ((1, 1, 1), (2, 7, 3), (5, 257, 37), (13, 131, 67), (31, 300, 101), (64, 513, 61), (130, 389, 211))


def kind_of(now: Settings | str, a: Tensor, weight: Tensor, transpose: bool, scaled: bool) -> str:
    """Who computes a call under these settings, or if a kind is named that one where it can."""
    (N, K), M = weight.shape, a.shape[0]
    size = (N, K) if transpose else (K, N)
    product = Product(a.dtype, transpose, M, *size, unit_stride=1 in weight.stride(), scaled=scaled)
    now = Settings(cpu_kind=now) if isinstance(now, str) else now
    return choose_kind(product, this_cpu(cpu_native.level().isa, now.tables), now)[0]


def product(now: Settings | str, a: Tensor, weight: Tensor, transpose: bool, in_scale: Tensor | None = None) -> Tensor:
    """The product through ``base_product``; checks that the blocks cover the output exactly once."""
    D = weight.shape[0] if transpose else weight.shape[1]
    out = torch.full((a.shape[0], D), float("nan"), dtype=a.dtype)
    seen = torch.zeros(out.shape, dtype=torch.int32)

    def epilogue(r0, r1, c0, c1, panel):
        assert r0 < r1 and c0 < c1 and c0 % 32 == 0
        seen[r0:r1, c0:c1] += 1
        if panel is not None:
            assert panel.shape == (r1 - r0, c1 - c0) and panel.dtype == torch.float32 and panel.stride(1) == 1
            out[r0:r1, c0:c1] = panel

    kind = kind_of(now, a, weight, transpose, in_scale is not None)
    base_product(a, weight, transpose=transpose, in_scale=in_scale, out=out, epilogue=epilogue, kind=kind)
    assert bool((seen == 1).all())
    return out


def operands(M: int, K: int, N: int, dtype, transpose: bool, layout: str = "rows") -> tuple[Tensor, Tensor]:
    """a (M, K or N) and weight (N, K), in a memory layout of that name."""
    a, w = torch.randn(M, K if transpose else N), torch.randn(N, K)
    if layout == "columns":
        return a.to(dtype).t().contiguous().t(), w.to(dtype).t().contiguous().t()
    if layout == "gaps":
        wide_a, wide_w = torch.full((M, 3 * a.shape[1]), float("nan")), torch.full((N, 2 * K), float("nan"))
        wide_a[:, ::3], wide_w[:, ::2] = a, w
        return wide_a.to(dtype)[:, ::3], wide_w.to(dtype)[:, ::2]
    if layout == "row stride":
        wide_a, wide_w = torch.full((M, a.shape[1] + 5), float("nan")), torch.full((N, K + 3), float("nan"))
        wide_a[:, 2:-3], wide_w[:, 1:-2] = a, w
        return wide_a.to(dtype)[:, 2:-3], wide_w.to(dtype)[:, 1:-2]
    return a.to(dtype), w.to(dtype)


def assert_accurate(out: Tensor, a: Tensor, weight: Tensor, transpose: bool, in_scale: Tensor | None = None) -> None:
    """RMS and largest error at most 1.5x those of torch's fp32 product, rounded, or below a floor."""

    def compute(a: Tensor, w: Tensor, s: Tensor | None) -> Tensor:
        return (a if s is None else a * s) @ (w.t() if transpose else w)

    exact = compute(a.double(), weight.double(), None if in_scale is None else in_scale.double())
    scaled = a.float() if in_scale is None else (a.float() * in_scale.float()).to(a.dtype).float()
    theirs = compute(scaled, weight.float(), None).to(a.dtype).double() - exact
    ours = out.double() - exact
    size = compute(a.double().abs(), weight.double().abs(), None if in_scale is None else in_scale.double().abs())
    floor = (4 if a.dtype == torch.float32 else 0.5) * 2 * EPS[a.dtype] * exact.abs() + 2.0**-24 * size + 2.0**-25
    for norm in (lambda e: e.square().mean().sqrt(), lambda e: e.abs().max()):
        assert norm(ours) <= torch.maximum(1.5 * norm(theirs), norm(floor)), (norm(ours), norm(theirs), norm(floor))


@pytest.mark.parametrize("transpose", (True, False), ids=("forward", "dx"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("vendor", "panels", "few"))
def test_product_is_accurate(kind, dtype, transpose, level):
    for M, K, N in SIZES:
        if kind == "vendor" and M * K * N > 100_000 and dtype != torch.float32:
            continue  # see the module's docstring
        if kind == "few" and M > 64:
            continue
        a, w = operands(M, K, N, dtype, transpose)
        assert_accurate(product(kind, a, w, transpose), a, w, transpose)


@pytest.mark.parametrize("layout", ("columns", "gaps", "row stride"))
@pytest.mark.parametrize("N", (1, 2, 3, 15))
def test_narrow_products_of_the_vendor_are_as_accurate_at_any_strides(N, layout, level):
    """The vendor's sums over what is not adjacent have twice the error of the others, and more."""
    a, w = operands(45, N, 1023, torch.float32, False, layout)[0], torch.randn(N, 1023)
    exact = a.double() @ w.double().t()
    error = [
        (forward(x, Base("dense", (w,)), N, "vendor").double() - exact).square().mean().sqrt()
        for x in (a, a.contiguous())
    ]
    assert error[0] <= 1.25 * error[1]


@pytest.mark.parametrize("layout", ("columns", "gaps", "row stride"))
@pytest.mark.parametrize("kind", ("vendor", "panels", "few"))
def test_any_strides_and_input_scale(kind, layout, level):
    for dtype in DTYPES:
        for transpose in (True, False):
            for scale_dtype in (torch.float32, dtype):
                a, w = operands(19, 45, 39, dtype, transpose, layout)
                scale = torch.rand(a.shape[1], dtype=torch.float32).to(scale_dtype)
                assert_accurate(product(kind, a, w, transpose, scale), a, w, transpose, scale)


@pytest.mark.parametrize("kind", ("panels", "few"))
def test_long_sums_stay_as_accurate_as_torch(kind, level):
    for transpose in (True, False):
        for C in (700, 5000):
            a, w = operands(8, C if transpose else 64, 64 if transpose else C, torch.float32, transpose)
            exact = a.double() @ (w.double().t() if transpose else w.double())
            theirs = a @ (w.t() if transpose else w)
            error = [(o.double() - exact).square().mean().sqrt() for o in (product(kind, a, w, transpose), theirs)]
            assert error[0] <= 1.3 * error[1]


def test_empty_and_expanded_operands():
    cpu_native.use_isa("auto")
    for kind in ("vendor", "panels", "few"):
        for dtype in DTYPES:
            assert product(kind, torch.empty(0, 5, dtype=dtype), torch.randn(3, 5).to(dtype), True).shape == (0, 3)
            zero = product(kind, torch.empty(4, 0, dtype=dtype), torch.empty(3, 0, dtype=dtype), True)
            assert torch.equal(zero, torch.zeros(4, 3, dtype=dtype))
            # What y.sum().backward() sends.
            ones, w = torch.ones((), dtype=dtype).expand(9, 33), torch.randn(33, 20).to(dtype)
            assert_accurate(product(kind, ones, w, False), ones, w, False)


def test_several_panels(level):
    """Panels smaller than the output, in both directions, with and without an input scale."""
    M, D, C = 1100, 2000, 40
    plan = cpu_native.blocks("panels", M, D, C, torch.get_num_threads())
    assert plan.rows < M and plan.cols < D
    for dtype in DTYPES:
        for transpose in (True, False):
            a, w = operands(M, C if transpose else D, D if transpose else C, dtype, transpose)
            scale = torch.rand(C)
            assert_accurate(product("panels", a, w, transpose), a, w, transpose)
            assert_accurate(product("panels", a, w, transpose, scale), a, w, transpose, scale)


def test_non_finite_values_stay_where_they_belong(level):
    for kind in ("panels", "few"):
        for dtype in DTYPES:
            for transpose in (True, False):
                a, w = operands(9, 70, 50, dtype, transpose)
                clean = product(kind, a, w, transpose)
                a[3, 7] = float("nan")
                dirty = product(kind, a, w, transpose)
                assert bool(dirty[3].isnan().all())
                rest = [i for i in range(9) if i != 3]
                assert torch.equal(dirty[rest], clean[rest])


@pytest.mark.parametrize("transpose", (True, False), ids=("forward", "dx"))
def test_few_rows_have_their_bits_in_any_batch(transpose, level):
    """Every number of rows up to 20 (all sizes of tiles), over several blocks and chains of the inner dimension."""
    for dtype in DTYPES:
        a, w = operands(64, 2500 if transpose else 70, 70 if transpose else 2500, dtype, transpose)
        whole = product("few", a, w, transpose)
        assert_accurate(whole, a, w, transpose)
        for M in range(1, 20):
            assert torch.equal(product("few", a[-M:], w, transpose), whole[-M:])


@pytest.mark.parametrize("C", (15, 16, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 1055, 2047, 2049, 3105))
def test_few_rows_of_any_length(C, level):
    """Lengths on both sides of a vector, a pair, a cache line, a chain, a block; columns on both sides of a group."""
    for dtype in DTYPES:
        for transpose in (True, False):
            for D in (1, 3, 12, 49, 65):
                a, w = operands(3, C if transpose else D, D if transpose else C, dtype, transpose)
                assert_accurate(product("few", a, w, transpose), a, w, transpose)


@pytest.mark.parametrize("kind", ("panels", "few"))
def test_threads_do_not_change_bits(kind, level):
    for dtype in DTYPES:
        for transpose in (True, False):
            a, w = operands(61, 301, 203, dtype, transpose)
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(product(kind, a, w, transpose))
            assert torch.equal(*results)


def test_batch_invariant_rows(level):
    """With PEFTKERN_BATCH_INVARIANT=1 a row has its bits in 50 random batches, whatever else is set."""
    generator = torch.Generator().manual_seed(3)
    for dtype in DTYPES:
        for transpose in (True, False):
            a, w = operands(150, 269, 131, dtype, transpose)
            whole = product(Settings(batch_invariant=True), a, w, transpose)
            for trial in range(50):
                now = Settings(cpu_base=("auto", "vendor", "panels")[trial % 3], batch_invariant=True)
                size = int(torch.randint(1, 140, (), generator=generator)) if trial % 2 else 1 + trial // 8
                rows = torch.randperm(150, generator=generator)[:size]
                assert torch.equal(product(now, a[rows], w, transpose), whole[rows])


def test_input_gradient_of_few_rows_has_the_bits_of_panels(level):
    """Before they are rounded: any number of rows of a, several chains, ends of pairs of terms and of columns."""
    for dtype in DTYPES:
        pairs = dtype == torch.bfloat16 and cpu_native._C.base_gemm_bf16_usable()
        for M, K, N in ((11, 95, 700), (1, 33, 2), (45, 130, 517), (64, 3, 261), (5, 64, 1)):
            a, w = operands(M, K, N, dtype, False)
            for rows in (a, a.t().contiguous().t()):
                panels = []
                for kind in ("bf16" if pairs else "panels", "few"):
                    base_product(
                        rows, w, transpose=False, in_scale=None, out=torch.empty((M, K), dtype=dtype),
                        epilogue=lambda *block, into=panels: into.append(block[-1].clone()),
                        kind=kind_of(kind, rows, w, False, False),
                    )  # fmt: skip
                assert len(panels) == 2 and torch.equal(*panels)


def test_half_precision_is_rounded_once(level):
    """1 + 2^-9 - 1 in bf16 is lost if the product is rounded before the epilogue adds to it."""
    seen = []

    def epilogue(r0, r1, c0, c1, panel):
        seen.append(panel - 1.0)

    for kind, M in (("panels", 70), ("few", 3)):
        a = torch.ones(M, 2, dtype=torch.bfloat16)
        w = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16)
        out = torch.empty(M, 1, dtype=torch.bfloat16)
        base_product(a, w, transpose=True, in_scale=None, out=out, epilogue=epilogue, kind=kind)
    assert len(seen) == 2
    assert all(bool((part == 2.0**-9).all()) for part in seen)


def test_scratch_is_bounded_for_any_layer():
    for threads in (1, 2, 7, 64, 256):
        for M in (1, 5, 64, 4096, 1_000_000):
            for D in (1, 1000, 14336, 500_000):
                for C in (1, 4096, 1_000_000):
                    plan = cpu_native.blocks("panels", M, D, C, threads)
                    assert plan.bytes <= SCRATCH_BYTES
                    assert plan.cols % 32 == 0
                    if M <= 64 and M * (C + 32) <= FEW_SCRATCH:
                        assert cpu_native.blocks("few", M, D, C, threads).bytes <= SCRATCH_BYTES


def choice(dtype, M, features, isa="avx512", setting="auto", invariant=False, unit_stride=True) -> str:
    product = Product(dtype, True, M, 4096, 4096, unit_stride)
    now = Settings(cpu_base=setting, batch_invariant=invariant)
    return choose_kind(product, Cpu(isa, frozenset(features)), now)[0]


def test_choice_follows_features_and_settings():
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert choice(bf16, 512, {"x86", "intel"}, isa="avx2") == "panels"
    assert choice(bf16, 512, {"x86", "intel"}) == "panels"
    assert choice(bf16, 512, {"x86", "intel", "amx_bf16"}) == "vendor"
    assert choice(bf16, 512, {"x86", "avx512_bf16"}) == "vendor"
    assert choice(fp16, 512, {"x86", "avx512_bf16", "amx_bf16"}) == "panels"
    assert choice(fp16, 512, {"x86", "intel", "amx_fp16"}) == "vendor"
    assert (
        choice(fp32, 512, {"x86", "intel"}) == choice(fp32, 4, {"x86"}) == "vendor"
    )  # tests/dispatch/test_cpu_base.py
    assert choice(fp32, 512, {"x86"}, setting="panels") == "panels"
    assert choice(bf16, 4, {"x86", "intel"}, isa="avx2") == "few"
    assert choice(bf16, 4, {"x86", "intel"}, isa="avx2", unit_stride=False) == "panels"
    assert choice(bf16, 4, {"x86"}, invariant=True) == "panels"
    assert choice(bf16, 512, {"x86"}, setting="vendor") == "vendor"
    assert choice(bf16, 512, {"x86", "amx_bf16"}, setting="panels") == "panels"
    # Our kernel on AVX512-BF16: where a table says so, and wherever ours is asked for.
    pairs = {"x86", "avx512_bf16", "bf16_kernel"}
    assert choice(bf16, 1024, pairs) == "vendor" and choice(bf16, 512, pairs, invariant=True) == "bf16"
    assert choice(bf16, 1024, pairs, setting="panels") == "bf16"
    # Not measured: torch's.
    assert choice(bf16, 4, set(), isa="plain") == "vendor"


def test_features_honour_the_instruction_set_setting():
    cpu_native.use_isa("auto")
    before = cpu_native.level()
    plain = this_cpu.__wrapped__("plain", ())
    assert plain.isa == "plain" and plain.features <= {"x86", "intel"}
    assert cpu_native.level() == before  # asking changes nothing


def test_native_entry_refuses_bad_arguments():
    good = dict(
        kind="panels", a=8, a_row=4, a_col=1, w=8, w_out=4, w_in=1, dtype=0, scale=0, out=8, ld=3, rows=2, cols=3, inner=4,
        scratch=8, scratch_floats=1 << 20, threads=1,
    )  # fmt: skip
    bad = (
        dict(a=0), dict(w=0), dict(out=0), dict(ld=2), dict(rows=-1), dict(dtype=3), dict(scratch=0), dict(inner=0),
        dict(scratch_floats=100), dict(threads=0), dict(kind="few", rows=65),
        dict(kind="few", w_out=4, w_in=2), dict(kind="bf16", dtype=0), dict(kind="bf16", dtype=1, scale=8), dict(kind=""),
    )  # fmt: skip
    for change in bad:
        with pytest.raises(ValueError):
            cpu_native._C.base_product(**(good | change))

"""Products of bf16 by AMX's tiles: the blocks around them and the definition of the instructions, on any machine.

``amx, stated`` is the kernel with each instruction in C++, ``amx`` the same file with the instructions; where a CPU has them
the two must agree to the bit.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_calls import base_product
from torch import Tensor

from peftkern.backends.cpu import native
from peftkern.dispatch.cpu_base import Cpu, choose_kind
from peftkern.dispatch.cpu_table import Product, Table
from peftkern.settings import Settings

pytestmark = pytest.mark.skipif(native._C is None, reason="the C++ extension is not built")

BF16 = torch.bfloat16
TERMS = 32  # of an instruction
# Rows on both sides of a register and of a tile; terms of a step, of a block (256) and beyond; columns likewise.
SIZES = (
    (1, 1, 1),
    (2, 31, 3),
    (15, 32, 16),
    (16, 33, 17),
    (17, 64, 31),
    (31, 255, 32),
    (32, 257, 33),
    (33, 300, 70),
    (70, 545, 97),
)


def product(a: Tensor, b: Tensor, kind: str = "amx, stated") -> Tensor:
    """a (M, C) times b (C, D), any strides, in fp32 as the kernel leaves it."""
    out = torch.full((a.shape[0], b.shape[1]), float("nan"))

    def epilogue(r0, r1, c0, c1, panel):
        out[r0:r1, c0:c1] = panel

    base_product(a, b.t(), transpose=True, in_scale=None, out=out, epilogue=epilogue, kind=kind)
    return out


def defined(a: Tensor, b: Tensor) -> Tensor:
    """The same by numpy, without denormals: per step even and odd terms apart, fused, then their sum added to the result.

    fp64 holds the exact sum of a product and what it is added to, for values not too far apart, so one rounding is made.
    """
    x, y = a.double().numpy(), b.double().numpy()
    out = np.zeros((x.shape[0], y.shape[1]), np.float32)
    for k in range(0, x.shape[1], TERMS):
        sums = np.zeros((2, *out.shape), np.float32)
        for i in range(k, min(k + TERMS, x.shape[1])):
            sums[i % 2] = np.multiply.outer(x[:, i], y[i]) + sums[i % 2].astype(np.float64)
        out += sums[0] + sums[1]
    return torch.from_numpy(out)


def operands(M: int, C: int, D: int) -> tuple[Tensor, Tensor]:
    """Random a (M, C) and b (C, D)."""
    return torch.randn(M, C).to(BF16), torch.randn(C, D).to(BF16)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bits_of_the_definition(size, level):
    a, b = operands(*size)
    expected = defined(a, b)
    assert torch.equal(product(a, b), expected)
    assert torch.equal(product(a, b.t().contiguous().t()), expected)  # forward: W adjacent along the terms


def test_any_strides_have_the_same_bits(level):
    a, b = operands(19, 45, 39)
    expected = product(a, b)
    wide_a, wide_b = torch.full((19, 135), float("nan"), dtype=BF16), torch.full((90, 117), float("nan"), dtype=BF16)
    wide_a[:, ::3], wide_b[::2, ::3] = a, b
    assert torch.equal(product(wide_a[:, ::3], wide_b[::2, ::3]), expected)
    assert torch.equal(product(a.t().contiguous().t(), b), expected)


def test_integers_are_exact(level):
    """Sums of small integers have no rounding, whatever the order: every term is there once."""
    a, b = (torch.randint(-8, 9, size).to(BF16) for size in ((100, 1000), (1000, 150)))
    assert torch.equal(product(a, b), (a.double() @ b.double()).float())


def test_error_is_that_of_fp32(level):
    a, b = operands(40, 3000, 50)
    exact = a.double() @ b.double()
    ours, theirs = product(a, b).double() - exact, (a.float() @ b.float()).double() - exact
    assert ours.square().mean() <= (1.5 * theirs.abs()).square().mean()


def test_denormals_count_as_zero(level):
    least, half = 2.0**-126, 2.0**-63
    for x, y, expected in (
        ((least, 0.0), (1.0, 0.0), least),
        ((least / 2, 0.0), (2.0, 0.0), 0.0),  # a term
        ((half, 0.0), (half / 2, 0.0), 0.0),  # a product
        ((half, half), (half / 2, half / 2), 0.0),  # even and odd are chains of their own
        (
            (half, 0.0, half, 0.0),
            (2 * half, 0.0, half / 2, 0.0),
            2 * least + least / 2,
        ),  # but a product within one is exact
        ((2 * half, half), (1.5 * half, -2 * half), least),
        ((1.5 * half, half), (half, -half), 0.0),  # their sum
    ):
        a, b = torch.tensor([x], dtype=BF16), torch.tensor([y], dtype=BF16).t()
        assert product(a, b).item() == expected, (x, y)


def test_a_row_has_its_bits_in_any_batch(level):
    a, b = operands(70, 333, 41)
    whole = product(a, b)
    for M in (1, 15, 16, 17, 31, 32, 33, 64):
        assert torch.equal(product(a[-M:], b), whole[-M:])
    a[3, 7] = float("nan")
    dirty = product(a, b)
    assert bool(dirty[3].isnan().all())
    dirty[3] = whole[3]
    assert torch.equal(dirty, whole)


def test_threads_do_not_change_bits(level):
    a, b = operands(61, 301, 203)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(product(a, b))
    assert torch.equal(*results)


def test_nothing_around_the_output_is_touched(level, guarded):
    for M, C, D in SIZES:
        a, b = operands(M, C, D)
        out = guarded(M, D, row_gap=16)
        scratch = torch.empty(native.blocks("amx, stated", M, D, C, 1).scratch)
        native._C.base_product(
            "amx, stated", a.data_ptr(), C, 1, b.data_ptr(), 1, D, 1, 0, out.out.data_ptr(), D + 16, M, D, C,
            scratch.data_ptr(), scratch.numel(), 1,
        )  # fmt: skip
        assert torch.equal(out.check(), product(a, b))


def test_levels_agree(level):
    a, b = operands(50, 290, 75)
    here = product(a, b)
    native._C.set_isa("plain")
    assert torch.equal(here, product(a, b))


@pytest.mark.skipif(
    native._C is None or not native._C.base_gemm_amx_usable(), reason="this CPU, system or build has no AMX"
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_instructions_have_the_bits_of_their_definition(size):
    a, b = operands(*size)
    assert torch.equal(product(a, b, "amx"), product(a, b))


def test_only_a_cpu_that_has_them_is_asked(level):
    usable = native._C.base_gemm_amx_usable()
    assert usable == ("amx_kernel" in native.facts(level)[1])
    if "amx_bf16" not in native._C.features() or level != "avx512":
        assert not usable
    if not usable:
        with pytest.raises(ValueError, match="kind amx: not on this CPU"):
            product(*operands(2, 4, 3), kind="amx")


def test_a_table_chooses_them_where_they_are():
    row = {
        "dtype": "bf16",
        "pass": "forward",
        "D": 64,
        "C": 64,
        "M": [64],
        "us": {"vendor": [90], "bf16": [60], "amx": [50]},
    }
    table = Table({"schema": 1, "meta": {}, "rows": [row]}, "x")
    with_pairs = Cpu("avx512", frozenset({"x86", "amx_bf16", "bf16_kernel"}), table)
    with_tiles = with_pairs._replace(features=with_pairs.features | {"amx_kernel"})

    def kind(on, scaled=False, **settings):
        return choose_kind(Product(BF16, True, 64, 64, 64, scaled=scaled), on, Settings(**settings))[0]

    assert kind(with_tiles) == "amx" and kind(with_pairs) == "bf16"
    assert kind(with_tiles, scaled=True) == "vendor"
    # Not measured: no speed is assumed.
    assert kind(with_tiles._replace(table=None)) == "vendor"
    assert kind(with_tiles, batch_invariant=True) == "bf16"
    assert kind(with_tiles, cpu_kind="amx") == "amx"
    assert kind(with_pairs, cpu_kind="amx") == kind(with_tiles, scaled=True, cpu_kind="amx") == "panels"

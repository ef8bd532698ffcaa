"""Bits made by the C++ kernels: dropout, and conversion of every kind of value between storage types and fp32."""

from __future__ import annotations

import kernel_calls
import numpy as np
import pytest
import torch

from peftkern.backends.cpu import native as cpu_native
from peftkern.problem import CpuWay

pytestmark = pytest.mark.skipif(cpu_native._C is None, reason="the C++ extension is not built")

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("seed", (0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF))
def test_dropout_mask(level, numpy_keep, seed):
    for M, K, p in ((1, 1, 0.5), (3, 7, 0.1), (2, 129, 0.9), (5, 1000, 0.25), (2, 4100, 2.0**-20)):
        got = cpu_native.dropout_mask((torch.tensor([seed]), M, K, p), CpuWay())
        assert np.array_equal(got.numpy(), numpy_keep(seed & (2**64 - 1), range(M), range(K), p))


@pytest.mark.parametrize("row0", (0, 5, 2**32 - 2, 2**40 + 3))
@pytest.mark.parametrize("col0", (0, 16, 2**35 - 16, 2**36 + 48))
def test_dropout_counters_are_64_bit(level, numpy_keep, row0, col0):
    """expand of ones by ones shows the bits of any block, wherever it lies in its matrix."""
    out, ones, panel = torch.empty(4, 60), torch.ones(4, 1), torch.ones(1, 64)
    cpu_native._C.lora_expand(
        out.data_ptr(), 0, 60, 0, 0, 0, 4, 60, 1, ones.data_ptr(), panel.data_ptr(), 64, 1.0, 77, 2**31, row0, col0,
        0, 0, 1,
    )  # fmt: skip
    expected = numpy_keep(77, range(row0, row0 + 4), range(col0, col0 + 60), 0.5)
    assert np.array_equal(out.numpy() != 0, expected)


def test_dropout_blocks_need_not_start_at_a_group(level, numpy_keep):
    """The native code takes any first column; only the panels' padding makes Python ask for multiples of 16."""
    for col0 in (1, 5, 7, 11, 510):
        out, ones, panel = torch.empty(2, 600), torch.ones(2, 1), torch.ones(1, 608)
        cpu_native._C.lora_expand(
            out.data_ptr(), 0, 600, 0, 0, 0, 2, 600, 1, ones.data_ptr(), panel.data_ptr(), 608, 1.0, 3, 2**30, 0, col0,
            0, 0, 1,
        )  # fmt: skip
        assert np.array_equal(out.numpy() != 0, numpy_keep(3, range(2), range(col0, col0 + 600), 0.25))


def all_bits() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(64, 1024)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal values, NaN at the same places, zeros of the same sign."""
    assert torch.equal(a.isnan(), b.isnan())
    number = ~a.isnan()
    assert torch.equal(a[number], b[number]) and torch.equal(torch.signbit(a[number]), torch.signbit(b[number]))


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=dtype)
    nothing = torch.empty(values.shape[0], 0), torch.empty(0, values.shape[1] + 16)
    kernel_calls.expand(out, src=values, v=nothing[0], p=nothing[1])
    return out


@pytest.mark.parametrize("dtype", HALVES)
def test_widening_every_value(level, dtype):
    values = all_bits().view(dtype)
    for row in values:
        out = torch.empty(1024)
        # One row: the sum over rows is the value itself.
        kernel_calls.column_dot(row[None], torch.ones(1, 1024), out)
        same(out + 0.0, row.float() + 0.0)
    copied = torch.empty(64, 1024)
    kernel_calls.scale_copy(values, copied)
    same(copied, values.float())


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_every_upper_half(level, dtype):
    """Every sign, exponent and upper significand, with the low bits that decide a rounding: ties, and beside them."""
    upper = all_bits().to(torch.int32) << 16
    for low in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | low).view(torch.float32)
        same(rounded(values, dtype), values.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_a_few_columns(level, dtype):
    """The code for the last columns of a row rounds like the code for whole vectors."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40, -1e-42, 65519.9, 65520.0, 3.4e38, -0.0,
                           1 + 2**-8, 1 + 2**-9, 2.0**-25, 2.0**-25 * 1.01, 6e-8, -7e-6])[None]  # fmt: skip
    for n in range(1, 16):
        same(rounded(values[:, :n].contiguous(), dtype), values[:, :n].to(dtype))

"""The floor model against hand-made numbers."""

from __future__ import annotations

import pytest
import torch

from peftkern.benchmarks.core.case import Case
from peftkern.benchmarks.core.floor import Least, layer_floor, least


def case(**changes):
    sizes = dict(M=2048, K=4096, N=4096, R=16) | changes
    dtype = sizes.pop("dtype", torch.bfloat16)
    return Case("lora_linear", "cpu", dtype, torch.float32, dropout=0.1, **sizes)


def test_counts():
    M, K, N, R = 3, 5, 7, 2
    fwd, both = (layer_floor(case(M=M, K=K, N=N, R=R), p) for p in ("fwd", "fwd_bwd"))
    assert fwd.base_flops == 2 * M * K * N and both.base_flops == 4 * M * K * N
    assert fwd.branch_flops == 2 * M * R * (K + N) and both.branch_flops == 6 * M * R * (K + N)
    assert fwd.branch_bytes == 2 * M * K + 4 * R * (K + N)
    assert both.branch_bytes == 2 * M * N + 4 * M * K + 3 * 4 * R * (K + N)
    assert both.base_bytes == 2 * fwd.base_bytes == 2 * 2 * (M * K + K * N + M * N)


def test_floors_by_hand():
    M, K, N, R = 2048, 4096, 4096, 16
    found = least(layer_floor(case(), "fwd_bwd"), 1e14, 2e10)
    assert found.flops == pytest.approx((4 * M * K * N + 6 * M * R * (K + N)) / 1e14)
    moved = 2 * 2 * (M * K + K * N + M * N) + 2 * M * N + 4 * M * K + 3 * 4 * R * (K + N)
    assert found.bytes == pytest.approx(moved / 2e10)


def test_the_longer_floor_is_the_bound():
    assert Least(2.0, 1.0).bound == (2.0, "flops") and Least(1.0, 2.0).bound == (2.0, "bytes")
    # Without a peak bytes alone are no bound to speak of.
    assert least(layer_floor(case(), "fwd"), None, 2e10).bound == (None, None)


def test_floors_grow_with_rank():
    found = [least(layer_floor(case(R=R), "fwd_bwd"), 1e12, 2e10) for R in (8, 16, 64)]
    assert found[0].flops < found[1].flops < found[2].flops and found[0].bytes < found[1].bytes < found[2].bytes

"""The floor model against hand-made numbers."""

from __future__ import annotations

import pytest
import torch

from peftkern.benchmarks.core.case import Case
from peftkern.benchmarks.core.floor import bytes_bound_fraction, floor_ratio, layer_floor


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


def test_ratio_by_hand():
    floor = layer_floor(case(), "fwd_bwd")
    # base at 100 TFLOP/s for a round figure, infinite bandwidth: the share of FLOPs is all
    ratio = floor_ratio(floor, floor.base_flops / 1e14, float("inf"))
    assert ratio == pytest.approx(1 + 6 * 16 * (4096 + 4096) / (4 * 4096 * 4096))
    # bytes alone: as long as the base takes, at a bandwidth that moves them in that time
    ratio = floor_ratio(floor, 1.0, floor.branch_bytes)
    assert ratio == pytest.approx(2 + floor.branch_flops / floor.base_flops)


def test_floor_grows_with_rank_and_stays_above_one():
    ratios = [floor_ratio(layer_floor(case(R=R), "fwd_bwd"), 1.0, 2e10) for R in (8, 16, 64)]
    assert 1 < ratios[0] < ratios[1] < ratios[2]


def test_bytes_bound_fraction_is_one_at_copy_bandwidth():
    floor = layer_floor(case(M=1), "fwd")
    seconds = (floor.base_bytes + floor.branch_bytes) / 2e10
    assert bytes_bound_fraction(floor, seconds, 2e10) == pytest.approx(1)
    assert bytes_bound_fraction(floor, 2 * seconds, 2e10) == pytest.approx(0.5)

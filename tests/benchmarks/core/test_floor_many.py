"""The floor with many adapters against hand-made numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from peftkern.benchmarks.core.case import Case
from peftkern.benchmarks.core.floor import branch_floor, counts, layer_floor

M, K, N, R = 8, 20, 12, 4
CASE = Case("multi_lora_linear", "cpu", torch.bfloat16, torch.float32, M, K, N, R, 0.0, 3, "identical", 0.5, "mixed",
            "training")  # fmt: skip


def test_counts():
    assert counts(CASE) == (4, 4 * 4, 4)
    spread = dataclasses.replace(CASE, mix="distinct", base_share=0.0)
    # ranks 4, 2, 1; three rows take the first, three the second, two the third
    assert counts(spread) == (8, 3 * 4 + 3 * 2 + 2 * 1, 4 + 2 + 1)


def test_floor_by_hand():
    fwd, both = (layer_floor(CASE, p) for p in ("fwd", "fwd_bwd"))
    assert fwd.base_flops == 2 * M * K * N and both.base_flops == 4 * M * K * N
    assert fwd.branch_flops == 2 * 16 * (K + N) and both.branch_flops == 6 * 16 * (K + N)
    assert fwd.branch_bytes == 2 * 4 * K + 4 * 4 * (K + N)
    assert both.branch_bytes == 2 * 4 * (2 * K + N) + 3 * 4 * 4 * (K + N)


def test_branch_alone_reads_adapters_in_use_and_x_and_writes_y():
    floor = branch_floor(CASE, "fwd")
    assert (floor.base_flops, floor.base_bytes) == (0, 0)
    assert floor.branch_bytes == 2 * (4 * K + M * N) + 4 * 4 * (K + N)


def test_one_adapter_for_all_is_lora_linear():
    single = dataclasses.replace(CASE, adapters=None)
    case = dataclasses.replace(CASE, adapters=1, base_share=0.0, ranks="same")
    for which in ("fwd", "fwd_bwd"):
        assert layer_floor(case, which) == layer_floor(single, which)


@pytest.mark.parametrize("which", ["fwd", "fwd_bwd"])
def test_no_adapter_no_branch(which):
    floor = layer_floor(dataclasses.replace(CASE, base_share=1.0), which)
    assert floor.branch_flops == floor.branch_bytes == 0

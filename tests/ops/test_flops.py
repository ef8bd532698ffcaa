"""torch's flop counter counts our ops as it counts the same layers in torch's own ops."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import peftkern
from peftkern import LoRALinear, lora_linear, multi_lora_linear, sgmv

M, N, K, R = 7, 6, 10, 3


def leaves(x_trains, A_trains, B_trains):
    tensors = torch.randn(M, K), torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
    return [t.requires_grad_(g) for t, g in zip(tensors, (x_trains, False, A_trains, B_trains), strict=True)]


def count(function, backward=True):
    with FlopCounterMode(display=False) as counter:
        y = function()
        if backward and y.requires_grad:
            y.sum().backward()
    return counter.get_total_flops()


def plain(x, W, A, B):
    return x @ W.t() + x @ A.t() @ B.t()


@pytest.mark.parametrize("trains", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 0, 0), (0, 0, 0)], ids=str)
def test_a_training_step_counts_as_torch_ops_do(trains):
    t = leaves(*map(bool, trains))
    assert count(lambda: lora_linear(*t)) == count(lambda: plain(*t)) > 0
    assert count(lambda: lora_linear(*t), backward=False) == 2 * M * (N * K + R * (N + K))


def test_frozen_lora_B_costs_what_it_costs():
    # dv is all that is left of it.
    t = leaves(False, True, False)
    assert count(lambda: lora_linear(*t)) == count(lambda: plain(*t))


def test_a_mixed_batch_counts_each_row_with_its_rank():
    x, W, A, B = leaves(True, True, True)
    wide = torch.randn(2 * R, K, requires_grad=True), torch.randn(N, 2 * R, requires_grad=True)
    adapters, ids = [(A, B, 1.0), (*wide, 0.5)], torch.tensor([0, 1, 1, -1, 0, -1, 1])
    rank_rows = 2 * R + 3 * 2 * R
    base, branch = 2 * M * N * K, 2 * rank_rows * (K + N)
    assert count(lambda: multi_lora_linear(x, W, adapters, ids)) == 2 * base + 3 * branch
    assert count(lambda: sgmv(x, adapters, ids)) == 3 * branch
    with torch.no_grad():
        out = torch.zeros(M, N)
        assert count(lambda: sgmv(x, adapters, ids, out=out)) == branch


def test_layers_and_other_ops():
    layer, x = LoRALinear(K, N, r=R), torch.randn(2, M, K)
    assert count(lambda: layer(x), backward=False) == 2 * 2 * M * (N * K + R * (N + K))
    _, W, A, B = leaves(False, False, False)
    assert count(lambda: torch.ops.peftkern.lora_row_norm([W], "dense", A, B, 1.0)) == 2 * N * K * R
    assert count(lambda: peftkern.dropout_mask(M, K, 0.5, 1)) == 0


def test_tensors_without_values_count_as_if_all_had_the_widest_rank():
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        x, W, A, B = (mode.from_tensor(t) for t in leaves(False, False, False))
        lora_linear(x, W, A, B)
    assert counter.get_total_flops() == 2 * M * (N * K + R * (N + K))


def test_a_counter_that_runs_before_the_first_call_and_no_import_for_those_who_do_not_count():
    program = """
import sys, torch, peftkern
assert "torch.utils.flop_counter" not in sys.modules
layer, x = peftkern.LoRALinear(10, 6, r=3), torch.randn(7, 10)
layer(x).sum().backward()
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    layer(x)
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * M * (N * K + R * (N + K))

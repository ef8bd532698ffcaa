"""The benchmark of ``bottleneck_adapter``: what is timed of a batch with several adapters, and its table."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import peftkern
from peftkern.benchmarks import bench as command
from peftkern.benchmarks.core.case import Case
from peftkern.benchmarks.ops import bottleneck_adapter
from peftkern.benchmarks.tables import bottleneck

CASE = Case("bottleneck_adapter", "cpu", torch.float32, torch.float32, 64, 40, 40, 16, 0.0)
MANY = bottleneck_adapter.PROVIDERS["peftkern_many"]


def test_widths_differ_and_are_those_of_one_adapter_on_the_average():
    assert bottleneck_adapter.widths(64) == [16, 32, 48, 64, 64, 96, 96, 96]
    for R in (48, 64, 256):
        own = bottleneck_adapter.widths(R)
        assert sum(own) == R * len(own)


def test_several_adapters_are_timed_where_they_are_served():
    def several(**changes):
        return bottleneck_adapter.plan(dataclasses.replace(CASE, **changes), "full")[2:]

    assert several() == ["loop", "peftkern_many"]
    bf16 = dict(dtype=torch.bfloat16)
    assert several(**bf16, adapter_dtype=torch.bfloat16) == ["loop", "peftkern_many"]
    for other in (dict(dropout=0.1), bf16, dict(M=60), dict(device="cuda")):
        assert several(**other) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_sequence_takes_its_adapter(dtype):
    case = dataclasses.replace(CASE, dtype=dtype, adapter_dtype=dtype)
    assert bottleneck_adapter.check(MANY, case) is None
    # Every adapter trains.
    step = MANY.build(case, bottleneck_adapter.make_data(case, 1))
    assert len(step.leaves[0]) == 1 + 4 * len(bottleneck_adapter.WIDTHS)
    assert all(g.any() for g in torch.autograd.grad(step.forward(0), step.leaves[0], step.dy[0]))


def test_the_wrong_adapter_is_noticed(monkeypatch):
    right = peftkern.multi_bottleneck_adapter
    monkeypatch.setattr(peftkern, "multi_bottleneck_adapter", lambda h, adapters, ids: right(h, adapters, ids.flip(0)))
    assert bottleneck_adapter.check(MANY, CASE).startswith("computes something else (y")


def test_the_table_has_both_parts(tmp_path):
    sizes = ["--shape", "64,40,40", "--rank", "16", "--seconds", "0.01", "--limit", "1000"]
    argv = ["--op", "bottleneck_adapter", "--device", "cpu", *sizes, "--dtype", "fp32", "--dropout", "0", "0.1"]
    assert command.main([*argv, "--json", str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    times = {(r["provider"], r["pass"]): r["median_ms"] for r in rows if r["dropout"] == 0.0}
    lines = bottleneck.markdown(rows, "fp32")
    # A line per dropout, then one per pass.
    first, second = (k for k, line in enumerate(lines) if line.startswith("fp32, "))
    assert [line.startswith("| 64x40 | 16 | fp32 | 0") for line in lines[first:second]].count(True) == 2
    for line, which in zip(lines[second + 4 :], ("fwd", "fwd_bwd")):
        one, loop, many = (times[name, which] for name in ("peftkern", "loop", "peftkern_many"))
        cells = [f"{one:.2f}", f"{loop / one:.2f}", f"{many / one:.2f}", f"{loop / many:.2f}x"]
        words = {"fwd": "forward", "fwd_bwd": "forward + backward"}[which]
        assert line == f"| 64x40 | 4 to 24 | {words} | {' | '.join(cells)} |"

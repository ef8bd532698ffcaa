"""The benchmark on this GPU, at sizes that take seconds: everything it is to measure is there, and can be judged."""

from __future__ import annotations

import json

import pytest
import torch

from peftkern.benchmarks import bench
from peftkern.benchmarks.core import gpu
from peftkern.benchmarks.core.presets import Choice
from peftkern.benchmarks.measure import launches
from peftkern.benchmarks.measure.device_timing import CudaClock, DeviceEntry
from peftkern.benchmarks.ops.lora_linear import PROVIDERS
from peftkern.benchmarks.peers.candidates import NOT_HERE
from peftkern.benchmarks.peers.data import make_data
from peftkern.benchmarks.registry import OPS

CASE = OPS["lora_linear"].cases("gpu", "cuda", Choice(shapes=[(512, 1024, 1024)], adapters=["same"], dropouts=[0.1]))[0]


@pytest.mark.parametrize("op, shape", [("lora_linear", "512,1024,1024"), ("multi_lora_linear", "64,1024,1024"),
                                       ("multi_lora_linear", "512,1024,1024")])  # fmt: skip
def test_the_command(op, shape, tmp_path):
    file = tmp_path / "r.json"
    many = ["--adapters", "8", "--mix", "sorted", "--ranks", "same", "--base-share", "0"] if "multi" in op else []
    argv = ["--op", op, "--device", "cuda", "--preset", "gpu", "--shape", shape, "--rank", "16", "--seconds", "0.1",
            "--repeats", "3", "--json", str(file), *many]  # fmt: skip
    code = bench.main(argv)
    result = json.loads(file.read_text())
    broken = {r["provider"]: r["skipped"] for r in result["rows"] if r["skipped"] and NOT_HERE not in r["skipped"]}
    assert code == 0, broken
    gpu_told = result["header"]["gpu"]
    assert gpu_told["multiprocessors"] > 0 and gpu_told["l2_bytes"] > 0 and result["header"]["copy_gb_per_s"] > 50
    assert result["header"]["product_tflop_per_s"]["bf16"] > 5
    for row in (r for r in result["rows"] if r["skipped"] is None):
        assert row["median_ms"] > 0 and row["repeats"] >= 3 and row["peak_bytes"] >= 0
        decoding = row.get("phase") == "decode"
        assert row["graph"] is (decoding and row["no_graph"] is None)
        if row["provider"] in ("base", "peftkern"):
            assert row["launches"] >= 1 and (not decoding or row["graph"]), row
    assert OPS[result["header"]["op"]].judge(result)


def test_a_graph_and_events_agree_on_a_long_step():
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    clock = CudaClock(cache)
    case = OPS["lora_linear"].cases(
        "gpu", "cuda", Choice(shapes=[(4096, 4096, 4096)], adapters=["same"], dropouts=[0.0])
    )[0]
    step = PROVIDERS["base"].build(case, make_data(case, 2))
    times = []
    for graph in (False, True):
        entry = DeviceEntry("base", step, True, clock=clock, copies=2, graph=graph)
        entry.warm()
        for _ in range(5):
            entry.once()
        assert entry.no_graph is None
        times.append(min(entry.seconds["fwd_bwd"]))
    assert times[0] == pytest.approx(times[1], rel=0.25)
    # Neither is faster than the chip.
    assert 4 * 4096**3 / times[1] < 1.3 * gpu.product_rates(clock, [torch.bfloat16])["bf16"]


def test_launches():
    data = make_data(CASE, 1)
    step = PROVIDERS["base"].build(CASE, data)
    step.forward(0)
    alone = launches.count(step, 0, False)
    assert alone is not None and 1 <= alone <= 3
    double = type(step)(lambda i: step.forward(i) + 0, step.leaves, step.dy)
    assert launches.count(double, 0, False) == alone + 1

    def waits(i):
        torch.cuda.synchronize()
        return step.forward(i)

    assert launches.count(type(step)(waits, step.leaves, step.dy), 0, False) is None
    torch.cuda.synchronize()
    assert launches.count(step, 0, False) == alone
    # Random numbers can be drawn as before, outside and in a graph.
    torch.nn.functional.dropout(torch.ones(64, device="cuda"), 0.5)
    data = make_data(CASE, 1)
    dropped = PROVIDERS["addmm"].build(CASE, data)
    dropped.forward(0)
    assert launches.count(dropped, 0, True) > alone

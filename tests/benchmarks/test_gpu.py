"""What is read of a GPU, without one: nvidia-smi's answer, rates, launches, and one line where there is nothing."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import time

import pytest
import torch

from peftkern.benchmarks import bench, report
from peftkern.benchmarks.core import gpu, machine
from peftkern.benchmarks.core.bench import Bench
from peftkern.benchmarks.measure import launches
from peftkern.benchmarks.peers.candidates import LINEAR, NOT_HERE
from peftkern.benchmarks.registry import OPS


def test_smi_answer():
    found = gpu.parse("570.86.15, 345, 2619, 1980, 2619, 70.21, 700.00, 31, P0\n")
    assert found["driver"] == "570.86.15" and found["sm_clock"] == 345 and found["power_limit"] == 700
    assert found["power"] == 70.21 and found["state"] == "P0"
    unknown = gpu.parse("570, 345, [N/A], 1980, 2619, , 700.00, 31, P8")
    assert unknown["memory_clock"] is None and unknown["power"] is None and unknown["driver"] == "570"
    assert gpu.parse("No devices were found") is None and gpu.parse("") is None


def test_absent_tools_are_none(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.nvcc() is None and gpu.smi(0) is None


def test_nvcc_release(monkeypatch):
    text = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.48\n"
    monkeypatch.setattr(gpu, "output", lambda *command: text)
    assert gpu.nvcc() == "13.0.48"


class _Clock:
    def __init__(self, times):
        self.times = list(times)

    def seconds(self, call):
        call()
        return self.times.pop(0)


def test_rates_are_of_the_best_sample():
    times = [1.0, 0.5, *[2.0] * 7]
    assert gpu.copy_rate(_Clock(times), "cpu", megabytes=1) == pytest.approx(8 * 2 * 2**20 / 0.5)
    found = gpu.product_rates(_Clock(times * 2), [torch.float32], "cpu", products=((4, 8, 16), (8, 8, 16)))
    assert found == {"fp32": pytest.approx(8 * 2 * 8 * 8 * 16 / 0.5)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("argv", [["--device", "cuda"], ["--device", "cuda", "--preset", "gpu", "--op",
                                                         "multi_lora_linear"], ["--preset", "gpu"], ["--graph"]])  # fmt: skip
def test_no_gpu_is_one_line(argv, capsys):
    assert bench.main(argv) == 2
    out = capsys.readouterr().out.strip()
    assert "\n" not in out and out.startswith("nothing is measured: ") and gpu.unavailable() in out


class OnCpu(Bench):
    """Its cases are those of a GPU, on the CPU."""

    def cases(self, preset, device, choice):
        return [dataclasses.replace(case, device="cpu") for case in super().cases(preset, device, choice)]


def test_the_command_on_a_device(monkeypatch, tmp_path, capsys):
    """From the command line to JSON, table and exit code, with the CPU in the device's place."""
    pytest.importorskip("peft")
    told = {"name": "A GPU", "arch": "sm_90", "memory_gib": 80.0}
    more = {"multiprocessors": 132, "l2_bytes": 1 << 20, "torch_cuda": "13.0", "nvcc": None, "smi": {"driver": "570"}}
    own = OnCpu(**vars(OPS["lora_linear"]) | dict(
        plan=lambda case, preset: OPS["lora_linear"].plan(dataclasses.replace(case, device="cuda"), preset),
    ))  # fmt: skip
    monkeypatch.setattr(bench, "OPS", {"lora_linear": own})
    monkeypatch.setattr(bench, "not_measured", lambda device, args: None)
    monkeypatch.setattr(bench, "rates", lambda device, cases: (_Wall(), 1e10, {"fp32": 1e11}))
    monkeypatch.setattr(machine.doctor, "gpu", lambda: told)
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(machine.torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(gpu, "details", lambda: more)
    monkeypatch.setattr(gpu, "smi", lambda: {"driver": "570", "sm_clock": 1980.0})
    file = tmp_path / "r.json"
    argv = ["--device", "cuda", "--preset", "gpu", "--shape", "32,64,48", "--dtype", "fp32", "--rank", "8", "--seconds",
            "0.01", "--repeats", "2", "--json", str(file)]  # fmt: skip
    assert bench.main(argv) == 0
    result = json.loads(file.read_text())
    assert result["header"]["gpu"] == told | more | {"smi_after": {"driver": "570", "sm_clock": 1980.0}}
    assert result["header"]["product_tflop_per_s"] == {"fp32": 0.1} and result["header"]["fma_gflop_per_s"] == {}
    assert result["header"]["device"] == "A GPU"
    by = {(r["provider"], r["dropout"], r["pass"]): r for r in result["rows"]}
    for name in ("peft", "addmm", "split", "peftkern"):
        assert by[name, 0.1, "fwd_bwd"]["median_ms"] > 0 and by[name, 0.1, "fwd"]["graph"] is False
    assert all(by[f"peftkern_{way.suffix}", 0.1, "fwd"]["skipped"].startswith(NOT_HERE) for way in LINEAR)
    out = capsys.readouterr().out
    assert "A GPU (sm_90)" in out and "peftkern: CUDA" in out and "lora_linear fp32, M x 64 x 48" in out
    assert report.tables("lora_linear", [result]).startswith("**A GPU** (sm_90)")


class _Wall:
    def seconds(self, call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class _Driver:
    """A graph with nodes of the given types, as the driver's library tells it."""

    def __init__(self, kinds, error=0):
        self.kinds, self.error = kinds, error

    def cuGraphGetNodes(self, graph, nodes, number):
        assert graph.value == 4096
        if nodes is None:
            number._obj.value = len(self.kinds)
        else:
            for i in range(len(self.kinds)):
                nodes[i] = 100 + i
        return self.error

    def cuGraphNodeGetType(self, node, kind):
        kind._obj.value = self.kinds[node.value - 100]
        return 0


def test_launches_are_the_nodes_that_do_something():
    # Kernels, a copy and a fill count; host calls, empty nodes and events do not.
    assert launches.work_nodes(4096, _Driver([0, 0, 1, 2, 3, 5, 6, 7])) == 4
    assert launches.work_nodes(4096, _Driver([])) == 0
    assert launches.work_nodes(4096, _Driver([0], error=1)) is None
    assert ctypes.sizeof(ctypes.c_void_p) == 8

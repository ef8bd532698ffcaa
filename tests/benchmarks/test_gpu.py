"""What is read of a GPU, without one: nvidia-smi's answer, rates, launches, and one line where there is nothing."""

from __future__ import annotations

import ctypes

import pytest
import torch

from peftkern.benchmarks import bench, gpu, launches

pytest.importorskip("rich")


def test_smi_answer():
    found = gpu.parse("570.86.15, 345, 2619, 1980, 2619, 700.00, 31, 0x0000000000000001\n")
    assert found["driver"] == "570.86.15" and found["sm_clock"] == 345 and found["power_limit"] == 700
    assert found["throttle_reasons"] == "0x0000000000000001"
    assert gpu.parse("570, 345, [N/A], 1980, 2619, , 31, 0x0")["memory_clock"] is None
    assert gpu.parse("570, 345, [N/A], 1980, 2619, , 31, 0x0")["driver"] == "570"
    assert gpu.parse("No devices were found") is None and gpu.parse("") is None


def test_absent_tools_are_none(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.nvcc() is None and gpu.smi(0) is None


def test_nvcc_release(monkeypatch):
    text = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.48\n"
    monkeypatch.setattr(gpu, "_output", lambda *command: text)
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

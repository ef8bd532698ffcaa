"""Timing on a GPU, with a clock of our own in its place: what a sample is, and what happens where a graph cannot be."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch

from peftkern.benchmarks.core.case import Case, Step
from peftkern.benchmarks.measure import device_timing
from peftkern.benchmarks.measure.device_timing import DeviceEntry, rotation, steps_of_sample
from peftkern.benchmarks.measure.runner import Runner, Settings
from peftkern.benchmarks.measure.timing import interleave
from peftkern.benchmarks.registry import OPS
from peftkern.benchmarks.tables import device as device_table


class FakeClock:
    """Every forward pass takes ``forward`` seconds and every backward pass ``backward``, a replay half of that."""

    def __init__(self, forward=1e-3, backward=2e-3, refuses=False):
        self.now, self.forward, self.backward, self.refuses = 0.0, forward, backward, refuses
        self.samples, self.captured = 0, 0

    def seconds(self, call):
        self.samples += 1
        start = self.now
        call()
        return self.now - start

    def capture(self, call):
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.captured += 1
        start = self.now
        call()
        took = self.now - start

        def replay():
            self.now += took / 2

        return replay


class _Tick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, clock):
        ctx.clock = clock
        clock.now += clock.forward
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        ctx.clock.now += ctx.clock.backward
        return dy, None


def entry(clock, copies=3, log=None, **more):
    x = [torch.ones(1, requires_grad=True) for _ in range(copies)]

    def forward(i):
        if log is not None:
            log.append(i)
        return _Tick.apply(x[i], clock)

    step = Step(forward, [[t] for t in x], [torch.ones(1)] * copies)
    return DeviceEntry("a", step, clock=clock, copies=copies, **more)


def test_samples_are_whole_turns_and_long_enough():
    for copies in (1, 2, 3, 7, 64):
        for seconds in (1e-9, 1e-6, 5e-6, 1e-4, 1e-3, 0.1):
            steps = steps_of_sample(seconds, copies)
            assert steps % copies == 0 and steps >= device_timing.LEAST_STEPS
            assert steps * seconds >= device_timing.SAMPLE_SECONDS or steps >= device_timing.MOST_STEPS
            assert steps <= max(device_timing.MOST_STEPS, device_timing.LEAST_STEPS, copies) + copies


def test_other_copies_exceed_the_cache_twice():
    for each in (1, 1 << 20, 40 << 20, 400 << 20):
        for cache in (32 << 20, 50 << 20):
            copies = rotation(each, cache)
            assert 2 <= copies <= 8 and (copies == 8 or (copies - 1) * each >= 2 * cache)
    assert rotation(40 << 20, 50 << 20) == 4


def test_a_sample_is_the_time_of_one_step():
    clock = FakeClock()
    one = entry(clock)
    one.warm()
    assert one.seconds == {"fwd": [], "fwd_bwd": []} and set(one.steps) == {"fwd", "fwd_bwd"}
    for _ in range(2):
        one.once(1)
    assert one.seconds["fwd"] == pytest.approx([1e-3] * 2) and one.seconds["fwd_bwd"] == pytest.approx([3e-3] * 2)


def test_inputs_rotate_from_the_copy_of_the_round():
    log = []
    one = entry(FakeClock(), log=log, backward=False)
    one.warm()
    log.clear()
    one.once(2)
    assert log == [2, 0, 1] * (one.steps["fwd"] // 3)


def test_a_graph_is_replayed_until_the_sample_is_long_enough():
    clock = FakeClock(forward=1e-5, backward=1e-5)
    one = entry(clock, graph=True, backward=False)
    one.warm()
    assert clock.captured == 1 and one.no_graph is None
    one.once()
    assert one.seconds["fwd"] == pytest.approx([5e-6])
    replay, times = one.replays["fwd"]
    assert times * one.steps["fwd"] * 5e-6 >= device_timing.SAMPLE_SECONDS


def test_what_cannot_be_captured_is_timed_without_a_graph_and_says_why():
    clock = FakeClock(refuses=True)
    one = entry(clock, graph=True)
    one.warm()
    one.once()
    assert one.no_graph == "RuntimeError: operation not permitted when stream is capturing"
    assert one.seconds["fwd"] == pytest.approx([1e-3])


def test_a_known_reason_is_not_tried():
    clock = FakeClock()
    one = entry(clock, graph=True, no_graph="its indices are lists")
    one.warm()
    assert clock.captured == 0 and one.no_graph == "its indices are lists"


def test_a_step_over_the_limit_is_not_timed():
    one = entry(FakeClock(forward=0.1, backward=9.0), limit=1.0)
    one.warm()
    assert one.stopped == {"fwd_bwd": pytest.approx(9.1)} and one.passes == ("fwd",)
    one.once()
    assert one.seconds["fwd_bwd"] == [] and len(one.seconds["fwd"]) == 1


def test_every_step_runs_inside_its_context():
    inside, log = [], []

    @contextlib.contextmanager
    def around():
        inside.append(True)
        yield
        inside.pop()

    clock = FakeClock()
    one = entry(clock, around=around)
    forward = one.step.forward
    one.step.forward = lambda i: log.append(bool(inside)) or forward(i)
    one.warm()
    one.once()
    assert log and all(log) and not inside


def test_providers_take_turns():
    clock = FakeClock()
    entries = [entry(clock, backward=False) for _ in range(3)]
    for one in entries:
        one.warm()
    assert interleave(entries, 3, seconds=0.0, min_repeats=4, max_repeats=9) == 4
    assert all(len(one.seconds["fwd"]) == 4 for one in entries)


class WallClock:
    """The host's clock, and graphs that run what they were made of."""

    def seconds(self, call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def capture(self, call):
        return call


@pytest.mark.parametrize("op, graph", [("lora_linear", False), ("lora_linear", True), ("multi_lora_linear", False)])
def test_rows_of_a_device(op, graph):
    bench = OPS[op]
    many = (3, "distinct", 0.0, "same", "decode") if op == "multi_lora_linear" else ()
    case = Case(op, "cpu", torch.float32, torch.float32, 16, 64, 48, 8, 0.0, *many)
    settings = Settings(preset="gpu", seconds=0.0, bandwidth=1e10, min_repeats=2, max_repeats=2, clock=WallClock(),
                        peaks={"fp32": 1e10}, graph=graph, memory=True, providers=("peft", "peftkern"))  # fmt: skip
    pytest.importorskip("peft")
    rows = [r for r in next(Runner(bench, settings).run([case])) if r["provider"] not in ("base_fp32", "base_own")]
    for row in rows:
        assert row["skipped"] is None and row["median_ms"] > 0 and row["repeats"] in (2, 4)
        assert row["steps"] >= device_timing.LEAST_STEPS and row["launches"] is None and row["peak_bytes"] is not None
        if row["provider"] != "copy":
            moved = bench.floor(case, row["pass"])
            flops = moved.base_flops + moved.branch_flops * (row["provider"] not in ("base",))
            assert row["flops_bound_fraction"] == pytest.approx(
                flops / 1e10 / row["median_ms"] * 1e3, rel=0.02, abs=1e-4
            )
    by = {r["provider"]: r for r in rows}
    if op == "lora_linear":
        assert all(r["graph"] is graph for r in rows)
    else:
        # Decoding is always in a graph, but for what cannot be.
        assert by["peftkern"]["graph"] and not by["peft"]["graph"] and "lists" in by["peft"]["no_graph"]


def test_the_table_of_a_device_has_a_line_for_every_provider():
    text = "\n".join(line for table in device_table.tables(_rows(), OPS["lora_linear"]) for line in table.lines())
    assert "frozen linear" in text and "1.250" in text and "peftkern: CUDA: not here: no kernel" in text
    assert "M 8192" in text and "drop 0.1" in text


def _rows():
    common = dict(op="lora_linear", dtype="bf16", M=8192, K=4096, N=4096, R=16, bytes_bound_fraction=0.5,
                  flops_bound_fraction=0.7, launches=4, peak_bytes=1 << 20, skipped=None, no_graph=None)  # fmt: skip
    common["pass"] = "fwd"
    base = common | dict(provider="base", adapter_dtype=None, dropout=None, median_ms=0.4, ratio_to_base=1.0)
    ours = common | dict(provider="peftkern", adapter_dtype="fp32", dropout=0.1, median_ms=0.5, ratio_to_base=1.25)
    absent = ours | dict(provider="peftkern_cuda", median_ms=None, ratio_to_base=None, skipped="not here: no kernel",
                         bytes_bound_fraction=None, flops_bound_fraction=None, launches=None, peak_bytes=None)  # fmt: skip
    return [base, ours, ours | dict(dropout=0.0), absent]

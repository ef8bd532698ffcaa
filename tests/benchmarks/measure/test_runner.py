"""What is skipped, what is stopped, and what a failing or wrong provider does to a run."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from peftkern.benchmarks.core.case import Case, Provider, Step
from peftkern.benchmarks.measure.probe import SHAPES, Probe
from peftkern.benchmarks.measure.runner import Runner, Settings
from peftkern.benchmarks.measure.timing import Entry, interleave
from peftkern.benchmarks.ops import lora_linear

CASE = Case("lora_linear", "cpu", torch.bfloat16, torch.float32, 64, 32, 32, 4, 0.0)
MEDIUM = dataclasses.replace(CASE, M=128, K=512, N=512)  # 67 MFLOP forward
SETTINGS = Settings(preset="quick", seconds=0.02, bandwidth=1e10, min_repeats=5, providers=("addmm", "peftkern"))


def _bench(name="addmm", **changes):
    provider = dataclasses.replace(lora_linear.PROVIDERS[name], **changes)
    return dataclasses.replace(lora_linear.BENCH, providers=lora_linear.PROVIDERS | {name: provider})


def _sleepy(per_flop: float, backward: float = 0.0):
    """A provider whose passes take a given time per FLOP, so that predictions can be checked."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, flops):
            ctx.flops = flops
            time.sleep(per_flop * flops)
            return x.new_zeros(x.shape[0], 1)

        @staticmethod
        def backward(ctx, dy):
            time.sleep(backward * ctx.flops)
            return dy.expand(-1, 1).new_zeros(dy.shape[0], ctx.needs_input_grad[0] and SIZE[0]), None

    def build(case, data):
        SIZE[0] = case.K
        x = torch.zeros(case.M, case.K, requires_grad=True)
        flops = 2.0 * case.M * case.K * case.N
        return Step(lambda i: Slow.apply(x, flops), [[x]], [torch.zeros(case.M, 1)])

    return build


SIZE = [0]


def _rows(bench, case=CASE, **settings):
    rows = next(Runner(bench, dataclasses.replace(SETTINGS, **settings)).run([case]))
    return {(r["provider"], r["pass"]): r for r in rows}


def test_a_hopeless_provider_is_skipped_with_a_reason_and_never_run():
    # 1 ns per FLOP: the case (8.6 GFLOP) would take 9 s.
    case = dataclasses.replace(CASE, M=1024, K=2048, N=2048)
    probe = Probe(_bench(build=_sleepy(1e-9)), limit=0.5)
    reasons = probe.skips("addmm", case)
    assert set(reasons) == {"fwd", "fwd_bwd"}
    assert "hopelessly slow in bf16 here" in reasons["fwd"] and "limit 0.5 s" in reasons["fwd"]
    assert probe.predict("addmm", case)[0] == pytest.approx(8.6, rel=0.5)
    assert all(r < 0.5 for r in probe.predict("addmm", MEDIUM))


def test_fp32_is_never_condemned_by_a_probe():
    case = dataclasses.replace(CASE, dtype=torch.float32, M=1024, K=2048, N=2048)
    assert Probe(_bench(build=None), limit=0.01).skips("addmm", case) == {}


def test_what_is_as_slow_as_fp32_is_not_hopeless():
    case = dataclasses.replace(CASE, M=1024, K=2048, N=2048)
    slow = dataclasses.replace(lora_linear.PROVIDERS["base_fp32"], build=_sleepy(1e-9))
    bench = _bench(build=_sleepy(2e-9))
    bench = dataclasses.replace(bench, providers=bench.providers | {"base_fp32": slow})
    assert Probe(bench, limit=0.5).skips("addmm", case) == {}


def test_a_hopeless_backward_leaves_the_forward():
    case = dataclasses.replace(CASE, M=256, K=512, N=512)
    probe = Probe(_bench(build=_sleepy(1e-10, backward=1e-8)), limit=0.5)
    assert set(probe.skips("addmm", case)) == {"fwd_bwd"}


def test_small_shapes_do_not_condemn_a_provider_that_is_fast_at_larger_ones():
    speeds = {}

    def build(case, data):
        # 1 s per GFLOP at the first shape, 10 ms from the second on
        speeds[case.shape] = 1e-9 if case.shape == SHAPES[0] else 1e-11
        return _sleepy(speeds[case.shape])(case, data)

    case = dataclasses.replace(CASE, M=1024, K=1024, N=1024)
    assert Probe(_bench(build=build), limit=1.0).skips("addmm", case) == {}
    assert SHAPES[1] in speeds


def test_a_problem_below_the_probe_is_not_probed():
    assert Probe(_bench(build=None), limit=1e-9).skips("addmm", CASE) == {}


def _condemn(monkeypatch, name):
    """The probe expects nine seconds a pass of this provider, and nothing of the others."""
    monkeypatch.setattr(Probe, "predict", lambda self, n, case: (9.0, 9.0) if n == name else (0.0, 0.0))


def test_rows_of_a_skipped_provider_have_the_reason(monkeypatch):
    _condemn(monkeypatch, "addmm")
    rows = _rows(lora_linear.BENCH, MEDIUM)
    for which in ("fwd", "fwd_bwd"):
        assert rows["addmm", which]["median_ms"] is None and "hopelessly slow" in rows["addmm", which]["skipped"]
        assert rows["peftkern", which]["median_ms"] > 0


def test_ratios_are_null_where_the_base_is_skipped(monkeypatch):
    _condemn(monkeypatch, "base")
    rows = _rows(lora_linear.BENCH, MEDIUM)
    ours = rows["peftkern", "fwd_bwd"]
    assert ours["median_ms"] > 0 and ours["ratio_to_base"] is None
    assert "hopelessly slow" in ours["no_base"]
    assert ours["ratio_to_fp32_base"] > 0 and ours["floor_over"] == "base_fp32"


def test_a_provider_that_raises_is_a_row_not_a_crash():
    def build(case, data):
        raise RuntimeError("broken on purpose\nsecond line")

    rows = _rows(_bench(build=build))
    assert rows["addmm", "fwd"]["skipped"] == "RuntimeError in build: broken on purpose"
    assert rows["peftkern", "fwd"]["skipped"] is None


def test_a_wrong_result_is_not_timed():
    bench = dataclasses.replace(lora_linear.BENCH, gate=lambda case: "failed the accuracy check (y 9.00x)")
    rows = _rows(bench)
    assert rows["peftkern", "fwd_bwd"]["median_ms"] is None
    assert "failed the accuracy check" in rows["peftkern", "fwd_bwd"]["skipped"]
    assert rows["addmm", "fwd_bwd"]["median_ms"] > 0


def test_the_gate_finds_a_wrong_op(monkeypatch):
    from peftkern.testing import accuracy

    assert lora_linear.gate(CASE) is None
    right = accuracy.run_ours
    monkeypatch.setattr(accuracy, "run_ours", lambda *a: {k: v * 1.01 for k, v in right(*a).items()})
    assert "failed the accuracy check (y " in lora_linear.gate(CASE)


def test_a_missing_package_is_the_reason():
    rows = _rows(_bench(missing=lambda: "x is not installed"))
    assert rows["addmm", "fwd"]["skipped"] == "x is not installed"


def _entry(name, log, seconds=0.0, limit=float("inf")):
    x = torch.zeros(1, 1, requires_grad=True)

    def forward(i):
        log.append((name, i))
        time.sleep(seconds)
        return x * 1

    return Entry(name, Step(forward, [[x], [x]], [torch.zeros(1, 1)] * 2), limit=limit)


def test_interleaving_rotates_and_alternates_copies():
    log = []
    entries = [_entry(n, log) for n in "abc"]
    assert interleave(entries, 2, seconds=0.0, min_repeats=3, max_repeats=9) == 3
    assert [name for name, _ in log] == list("abcbcacab")
    assert [i for _, i in log] == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert all(len(e.seconds["fwd_bwd"]) == 3 for e in entries)


def test_the_yardstick_runs_twice_a_round():
    log = []
    interleave([_entry(n, log) for n in "abcd"], 1, seconds=0.0, min_repeats=2, max_repeats=2, often=("a",))
    assert [n for n, _ in log].count("a") == 4 and len(log) == 10


def test_rounds_go_on_until_the_time_is_up():
    log = []
    start = time.perf_counter()
    rounds = interleave([_entry("a", log, 0.01)], 1, seconds=0.2, min_repeats=1, max_repeats=1000)
    assert rounds == len(log) <= 20 and time.perf_counter() - start >= 0.2


def test_a_step_over_the_limit_is_run_once():
    log = []
    entry = _entry("a", log, 0.02, limit=0.01)
    interleave([entry], 1, seconds=0.0, min_repeats=5, max_repeats=5)
    assert len(log) == 1 and set(entry.stopped) == {"fwd", "fwd_bwd"}


def test_provider_names_are_unique():
    assert all(isinstance(p, Provider) and p.name == name for name, p in lora_linear.PROVIDERS.items())

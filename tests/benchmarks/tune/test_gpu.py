"""The tuner: plans, choices and tables from made-up times, calls on CPU tensors. No GPU is needed."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import types

import pytest
import torch

from peftkern.benchmarks.tune import calls as tune_calls
from peftkern.benchmarks.tune import gpu as tune
from peftkern.benchmarks.tune import main as command
from peftkern.benchmarks.tune.plan import CODED, COMPOSITION, OPS, Job, candidates, copies, fastest, jobs
from peftkern.dispatch import tuned
from peftkern.kernels import configs
from peftkern.settings import Settings

FAKE = "Imaginary GPU X-1"
USERS = Job("lora_linear_fwd", "bf16", "fp32", True, 8192, 4096, 4096, 16)
SMALL = [
    Job(op, "bf16", adapter, dropout, 6, 24, 40, 4)
    for op in OPS["lora_linear"]
    for adapter in ("fp32", "bf16")
    for dropout in (False, True)
] + [Job("sgmv_add", "bf16", adapter, False, 6, 24, 40, 4) for adapter in ("fp32", "bf16")]
SMALL += [Job("multi_lora_linear_fwd", "bf16", adapter, False, 6, 24, 40, 4) for adapter in ("fp32", "bf16")]
SMALL += [Job("lora_row_norm", "bf16", adapter, False, 0, 24, 40, 4) for adapter in ("fp32", "bf16")]  # fmt: skip
SMALL += [Job(op, "bf16", "fp32", False, 6, 24, 40, 4, base) for op in OPS["quantised"] for base in CODED]


def test_what_users_run_comes_first():
    work = jobs("lora_linear")
    assert len(set(work)) == len(work)
    assert work[:2] == [dataclasses.replace(USERS, op=op) for op in OPS["lora_linear"]]
    first = {(j.N, j.K) for j in work[:8]}
    assert {(4096, 4096), (14336, 4096), (4096, 14336)} <= first
    assert {j.op for j in jobs("multi_lora_linear")} == {"sgmv_add", "multi_lora_linear_fwd"}


def test_a_run_that_stops_early_has_some_of_each_op():
    work = tune.planned(tune.parser().parse_args([]))
    assert sorted(map(str, work)) == sorted(str(j) for op in OPS for j in jobs(op))
    assert work[0] == USERS and {j.op for j in work[:20]} == {op for ops in OPS.values() for op in ops}


def test_any_number_of_rows_is_near_a_planned_one():
    rows = tuned.parse({"schema": 1, "rows": [vars(j) | {"choice": "cuda"} for j in jobs("lora_linear")]}, "x")
    for m in range(1, 16384, 7):
        assert tuned.lookup(rows, dataclasses.replace(USERS, M=m, dropout=m >= 128).problem(90)), m


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_candidates(arch):
    for job in [job for op in OPS for job in jobs(op)]:
        found = candidates(job, arch)
        labels = [c.label for c in found]
        assert len(set(labels)) == len(labels) and all(c.label.split()[0] == c.name for c in found)
        assert {c.name for c in found if c.eligible} <= set(tuned.CANDIDATES)
        assert set(configs.BASES) <= set(tuned.CANDIDATES)
        assert (COMPOSITION in labels) == (job.op in OPS["lora_linear"] and not job.base)
        for c in found:
            assert c.config is None or c.config.invalid(2, arch) is None
        # A cast of fp32 adapters, or a branch dropped in half precision, is not exact enough to be chosen.
        exact = job.adapter_dtype == "fp32" or (job.dropout and job.op == "lora_linear_bwd")
        assert ("addmm" in labels) == (not exact and job.op in OPS["lora_linear"])
        if job.base:
            assert labels == ["fused", "epilogue", "cuda"]
    assert candidates(USERS, arch)[0].name == "epilogue"
    assert sum(c.config is not None for c in candidates(USERS, arch)) == 2


def test_inputs_exceed_the_cache():
    for job in jobs("lora_linear"):
        assert 2 <= copies(job, 50 << 20) <= 32
        assert copies(job, 50 << 20) * job.bytes_read > 100 << 20 or copies(job, 50 << 20) == 32


def made_up(job: Job, rng: random.Random) -> tuple[dict, dict]:
    times, not_run = {}, {}
    for c in candidates(job, 90):
        if c.label != "epilogue" and rng.random() < 0.2:
            not_run[c.label] = "made up"
        else:
            times[c.label] = [rng.uniform(10, 20) for _ in range(5)]
    return times, not_run


def test_the_choice_is_never_slower_than_addmm_in_its_own_table():
    rng, seen = random.Random(0), set()
    for job in jobs("lora_linear"):
        row = tune.row(job, candidates(job, 90), *made_up(job, rng), 2)
        chosen = next(c for c in candidates(job, 90) if c.name == row["choice"] and _config(c) == row["config"])
        assert row["us"][chosen.label] == min(row["us"][label] for label in row["eligible"])
        if "addmm" in row["eligible"]:
            assert row["us"][chosen.label] <= row["us"]["addmm"]
        if row["over_composition"] is not None:
            assert row["over_composition"] == round(row["us"][chosen.label] / row["us"][COMPOSITION], 4)
        assert row["choice"] != COMPOSITION
        seen.add(row["choice"])
    assert seen == {"addmm", "epilogue", "overlap", "fused", "cuda"}


def _config(candidate):
    return dataclasses.asdict(candidate.config) if candidate.config else None


def test_fastest():
    assert fastest({"a": 2.0, "b": 1.0, "c": 0.5}, ["a", "b"]) == "b"
    assert fastest({"a": 1.0, "b": 1.0}, ["a", "b"]) == "a"
    with pytest.raises(ValueError, match="none of a"):
        fastest({"c": 1.0}, ["a"])


def test_a_table_written_is_the_table_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tune.doctor, "gpu", lambda: {"name": FAKE, "arch": "sm_90", "memory_gib": 80.0})
    now = Settings(tables=(str(tmp_path),), gpu=FAKE)
    rng = random.Random(1)
    rows = [tune.row(j, candidates(j, 90), *made_up(j, rng), 2) for j in jobs("lora_linear")[:60]]
    data = tune.table(rows, [], 60, 0.0)
    tune.write(tmp_path / tuned.file_name(FAKE), data)
    assert json.loads((tmp_path / tuned.file_name(FAKE)).read_text()) == data
    assert {"gpu", "driver", "versions", "commit", "date"} <= set(data["meta"])
    for row in rows:
        job = Job(**{f.name: row[f.name] for f in dataclasses.fields(Job)})
        entry = tuned.entry(job.problem(90), now)
        assert entry == (row["choice"], row["config"])
        assert entry.config is None or configs.LaunchConfig(**entry.config).invalid(2, 90) is None


@pytest.mark.parametrize("job", SMALL, ids=str)
def test_calls(job, monkeypatch):
    """Arguments fit the ops, overrides are in force, and plain torch computes the same but for its dropout."""
    from peftkern.dispatch import registry as dispatch

    used = []

    def watch(name):
        def run(c, way=None):
            used.append(dict(way.fixed).get("base") if way else None)
            dispatch.OPS[name].describe(c)
            return dispatch.OPS[name].reference(c)

        return run

    module = types.SimpleNamespace(
        OPS={job.op: watch(job.op)}, unavailable=lambda now: None, decline=lambda p, now: None if p.R == 4 else "no"
    )
    monkeypatch.setattr(tune_calls, "load", lambda name: module)
    inputs = tune_calls.make_inputs(job, 2, "cpu")
    results = {}
    for candidate in candidates(job, 90):
        call, reason = tune_calls.call_of(candidate, inputs, 90)
        assert reason is None
        results[candidate.label] = call(1)
        if candidate.name != COMPOSITION:
            assert used.pop() == (candidate.name if candidate.name in configs.BASES else None)
    if job.op == "lora_row_norm":
        assert torch.equal(results["triton"], results["cuda"])
    if job.op == "multi_lora_linear_fwd":
        assert torch.equal(results["triton"][0], results["cuda"][0]) and results["cuda"][0].shape == (job.M, job.N)
    if job.op not in OPS["lora_linear"] or job.dropout or job.base:
        return
    got = results.pop(COMPOSITION)
    expected = next(iter(results.values()))
    if job.op == "lora_linear_bwd":
        got, expected = list(got), list(expected[:3])
    else:
        got, expected = [got], [expected[0]]
    assert tune.differs([t.float() for t in got], [t.float() for t in expected]) is None


class _Clock:
    """Stands for a CUDA event: a clock that each call of the op moves by what it costs."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = _Clock.now
        _Clock.now += 0.5

    def elapsed_time(self, end):
        return end.at - self.at


def test_the_whole_run_with_a_made_up_clock(monkeypatch, tmp_path, capsys):
    """Everything but the GPU: a wrong candidate is refused, one that fails is named, the fastest of the others wins."""
    from peftkern.dispatch import registry as dispatch

    costs = {"epilogue": 3.0, "fused": 2.0, "cuda": 1.0}

    def load(name):
        def run(op, *args, way=None):
            fixed = dict(way.fixed) if way else {}
            which = "cuda" if name == "cuda" else fixed.get("base")
            _Clock.now += costs.get(which, 5.0)
            if "gemm" in fixed:
                raise RuntimeError("out of shared memory")
            out = dispatch.OPS[op].reference(*args)
            return out if which != "cuda" else tuple(t * 2 for t in out)

        ops = {op: functools.partial(run, op) for op in dispatch.OPS}
        return types.SimpleNamespace(OPS=ops, unavailable=lambda now: None, decline=lambda p, now: None)

    monkeypatch.setattr(tune_calls, "load", load)
    monkeypatch.setattr(tune, "make_inputs", lambda job, count, device: tune_calls.make_inputs(job, count, "cpu"))
    monkeypatch.setattr(tune.machine, "cache_bytes", lambda device: 1 << 10)
    fakes = dict(
        Event=_Clock, _sleep=lambda cycles: None, synchronize=lambda: None, empty_cache=lambda: None,
        get_device_capability=lambda: (9, 0), get_device_name=lambda: FAKE, is_available=lambda: True,
    )  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(tune.doctor, "gpu", lambda: {"name": FAKE})
    wanted = [dataclasses.replace(j, M=2048, N=24, K=40) for j in jobs("lora_linear")[:2]]
    monkeypatch.setattr(tune, "planned", lambda args: wanted)
    file = tmp_path / "t.json"
    assert tune.main(["--json", str(file), "--repeats", "3"]) == 0, capsys.readouterr().err
    data = json.loads(file.read_text())
    assert data["meta"]["planned"] == data["meta"]["measured"] == 2 and not data["meta"]["failed"]
    for row in data["rows"]:
        assert row["choice"] == "fused" and row["us"]["fused"] == 2500 and row["us"]["epilogue"] == 3500
        assert "differs" in row["not_run"]["cuda"] and row["repeats"] == 3
        assert sum("out of shared memory" in why for why in row["not_run"].values()) == 2
    costs["epilogue"] = 1.0
    assert tune.main(["--json", str(file), "--repeats", "3"]) == 0
    assert {r["choice"] for r in json.loads(file.read_text())["rows"]} == {"epilogue"}
    monkeypatch.setattr(tune, "measure", lambda job, repeats: 1 / 0)
    assert tune.main(["--json", str(file)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_candidate_that_cannot_run_says_why(monkeypatch):

    inputs = types.SimpleNamespace(job=USERS, arguments=[])
    for module, why in (
        (types.SimpleNamespace(OPS={}, unavailable=lambda now: "no device"), "no device"),
        (types.SimpleNamespace(OPS={}, unavailable=lambda now: None), "no kernel for lora_linear_fwd"),
        (
            types.SimpleNamespace(OPS={USERS.op: 1}, unavailable=lambda now: None, decline=lambda p, now: "too odd"),
            "too odd",
        ),
    ):
        monkeypatch.setattr(tune_calls, "load", lambda name, module=module: module)
        call, reason = tune_calls.call_of(candidates(USERS, 90)[0], inputs, 90)
        assert call is None and why in reason


def test_a_wrong_result_is_not_timed():
    right = [torch.tensor([1.0, -2.0])]
    assert tune.differs([torch.tensor([1.0, -2.01])], right) is None
    assert "has 0 results" in tune.differs([], right)
    assert "result 0 differs" in tune.differs([torch.tensor([1.0, 2.0])], right)
    assert "differs" in tune.differs([torch.tensor([1.0, float("nan")])], right)


def test_dry_run(tmp_path, capsys):
    file = tmp_path / "t.json"
    assert command.main(["--cuda", "--dry-run", "--op", "lora_linear", "--json", str(file)]) == 0
    assert "problems" in capsys.readouterr().out
    assert tuned.parse(json.loads(file.read_text()), "t") == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    file = tmp_path / "t.json"
    assert tune.main(["--json", str(file)]) == 1
    assert "no CUDA device" in capsys.readouterr().err and not file.exists()

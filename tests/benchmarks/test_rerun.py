"""Rows that lose to the addmm_ function are run three times again, and the verdict uses the median."""

from __future__ import annotations

import json

import pytest

from peftkern.benchmarks import bench, rerun
from peftkern.benchmarks.judge.lora_linear import judged_against_addmm


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "r.json"
    argv = ["--device", "cpu", "--shape", "16,32,32", "--rank", "4", "--dropout", "0", "0.1", "--dtype", "fp32",
            "--provider", "addmm", "peftkern", "--seconds", "0.02", "--no-gate", "--json", str(path)]  # fmt: skip
    assert bench.main(argv) == 0
    result = json.loads(path.read_text())
    # made to lose at dropout 0 and to win at 0.1, both by far
    for row in result["rows"]:
        if row["provider"] == "peftkern":
            row["median_ms"] = 1e3 if row["dropout"] == 0 else 1e-3
    bench.write(path, result)
    return path


def _rerun(monkeypatch, file, ratios):
    """--rerun with a runner whose rows have these ratios in turn."""
    run = rerun.Runner.run
    left = list(ratios)

    def fake(self, cases):
        rows = next(run(self, cases))
        ratio = left.pop(0)
        for row in rows:
            row["median_ms"] = {"peftkern": ratio, "addmm": 1.0}.get(row["provider"], 1.0)
        yield rows

    monkeypatch.setattr(rerun.Runner, "run", fake)
    code = bench.main(["--rerun", str(file)])
    assert not left
    return code, json.loads(file.read_text())


def test_losers_only_and_the_median_counts(monkeypatch, file, capsys):
    before = json.loads(file.read_text())
    code, after = _rerun(monkeypatch, file, [1.2, 1.01, 1.03])
    assert code == 0 and "1 rows run again" in capsys.readouterr().out
    assert after["rows"] == before["rows"]
    (again,) = after["reruns"]
    assert again["ratios"] == [1.2, 1.01, 1.03] and again["median"] == 1.03 and again["dropout"] == 0
    assert max(judged_against_addmm(after).values()) == pytest.approx(1.03)
    # a second --rerun has nothing left to do
    monkeypatch.undo()
    assert bench.main(["--rerun", str(file)]) == 0
    assert json.loads(file.read_text())["reruns"] == after["reruns"]


def test_a_row_that_stays_slow_fails(monkeypatch, file):
    code, after = _rerun(monkeypatch, file, [1.2, 1.01, 1.1])
    assert code == 1 and after["reruns"][0]["median"] == 1.1


def test_a_real_rerun_measures(file):
    bench.main(["--rerun", str(file)])
    (again,) = json.loads(file.read_text())["reruns"]
    assert len(again["ratios"]) == 3 and all(0.01 < r < 100 for r in again["ratios"])

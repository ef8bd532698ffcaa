"""verify: passes on what is right, fails and names the problem on what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

from peftkern.benchmarks import verify
from peftkern.testing import accuracy

pytest.importorskip("rich")


@pytest.fixture
def small(monkeypatch):
    """Problems that take milliseconds."""
    from peftkern.testing import problems

    whole = problems.random_problem
    limits = dict(max_M=40, max_KN=60, max_R=12)
    monkeypatch.setattr(problems, "random_problem", lambda seed, dtype, **kw: whole(seed, dtype, **(limits | kw)))


def test_three_problems(small, tmp_path, capsys):
    file = tmp_path / "v.json"
    assert verify.main(["--problems", "3", "--backend", "reference", "--json", str(file)]) == 0
    assert "3 problems" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert {r["dtype"] for r in written["rows"]} == {"fp32", "bf16", "fp16"}
    assert all(r["ok"] and r["ratio"] <= 1 for r in written["rows"])
    assert written["header"]["versions"]["torch"] == torch.__version__


def test_a_wrong_result_fails_and_can_be_repeated(small, monkeypatch, capsys):
    right = accuracy.run_ours
    monkeypatch.setattr(accuracy, "run_ours", lambda *a: {k: v * 1.5 for k, v in right(*a).items()})
    assert verify.main(["--problems", "1", "--backend", "reference", "--dtype", "fp32", "--seed", "7"]) == 1
    out = capsys.readouterr().out
    assert "FAILED fp32:7" in out and "--problem fp32:7 --backend reference" in out
    monkeypatch.setattr(accuracy, "run_ours", right)
    assert verify.main(["--problem", "fp32:7", "--backend", "reference"]) == 0


def test_nan_fails(small, monkeypatch):
    right = accuracy.run_ours
    monkeypatch.setattr(accuracy, "run_ours", lambda *a: {k: v * float("nan") for k, v in right(*a).items()})
    assert verify.main(["--problem", "fp32:7", "--backend", "reference"]) == 1


def test_an_exception_is_a_failure(small, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(accuracy, "run_ours", broken)
    assert verify.main(["--problem", "bf16:3", "--backend", "reference"]) == 1
    assert "broken on purpose" in capsys.readouterr().out


def test_settings_hold_only_inside(monkeypatch):
    import os

    monkeypatch.setenv("PEFTKERN_BACKEND", "auto")
    monkeypatch.delenv("PEFTKERN_CPU_BASE", raising=False)
    with verify.Target("cpu, panels", {"PEFTKERN_BACKEND": "cpu", "PEFTKERN_CPU_BASE": "panels"}).active():
        assert os.environ["PEFTKERN_BACKEND"] == "cpu" and os.environ["PEFTKERN_CPU_BASE"] == "panels"
    assert os.environ["PEFTKERN_BACKEND"] == "auto" and "PEFTKERN_CPU_BASE" not in os.environ


def test_targets():
    names = [t.name for t in verify.targets("all", None)]
    assert names == ["reference", "cpu, vendor", "cpu, panels", "triton, interpreted"]
    assert [t.name for t in verify.targets("cpu", "panels")] == ["cpu, panels"]


def test_names_cover_dtypes_and_enough_large_ones():
    dtypes = ["fp32", "bf16", "fp16"]
    names = verify.names(300, dtypes, 0, large=True)
    assert len(set(names)) == 300
    for dtype in dtypes:
        own = [n for n in names if n.startswith(dtype)]
        assert len(own) == 100 and sum(n.endswith(":large") for n in own) >= 7
    assert sum(n.endswith(":large") for n in names) >= 20


def test_large_problems_are_large():
    problem = verify.named("bf16:5:large")
    assert problem.M * problem.K * problem.N > 2**31 and problem.dtype == torch.bfloat16


def test_the_interpreter_gets_no_large_problem_and_no_bf16():
    args = verify._parser().parse_args(["--problem", "fp32:1:large", "bf16:2", "fp16:3"])
    triton = verify.targets("triton", None)[0]
    assert verify._chosen(args, triton) == ["fp16:3"]
    with pytest.raises(ValueError, match="large"):
        verify.named("fp32:1:large", **verify.INTERPRETED)


@pytest.mark.parametrize("name", ["fp32", "fp33:1", "fp32:x", "fp32:1:huge"])
def test_bad_names(name):
    with pytest.raises(ValueError, match="DTYPE:SEED"):
        verify.named(name)


def test_a_back_end_that_is_asked_for_but_not_usable_is_an_error(monkeypatch):
    monkeypatch.setattr(verify.Target, "reason", lambda self: "for this test")
    assert verify.main(["--problems", "1", "--backend", "cpu"]) == 1

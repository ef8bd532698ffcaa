"""verify: passes on what is right, fails and names the problem on what is wrong."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from peftkern.testing import accuracy
from peftkern.verify import main as verify
from peftkern.verify.problem_sets import SETS


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


@pytest.mark.parametrize("op", SETS)
def test_every_op(op, small, capsys):
    names = [f"{SETS[op].prefix}{problem}" for problem in ("fp32:3", "fp16:1")]
    assert verify.main(["--op", op, "--backend", "reference", "--problem", *names]) == 0
    assert "2 problems" in capsys.readouterr().out


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
    names = [t.name for t in verify.targets(["all"], None)]
    assert names == ["reference", "cpu, vendor", "cpu, panels", "triton, interpreted"]
    assert [t.name for t in verify.targets(["cpu"], "panels")] == ["cpu, panels"]


def test_targets_on_a_gpu():
    found = verify.targets(["all"], None, device="cuda")
    assert [t.name for t in found] == ["reference", "cuda", "triton", "auto"]
    assert all(t.device == "cuda" and not t.interpreted for t in found)
    assert {t.environment["TRITON_INTERPRET"] for t in found} == {"0"}
    assert [t.name for t in verify.targets(["triton", "cuda"], None, device="cuda")] == ["cuda", "triton"]


def test_a_back_end_of_another_device_is_wrong_use(capsys):
    with pytest.raises(SystemExit):
        verify.main(["--device", "cuda", "--backend", "cpu"])
    assert "no back end of cuda tensors" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_its_back_ends_say_so(capsys):
    assert verify.main(["--device", "cuda", "--problems", "1"]) == 1
    assert capsys.readouterr().out.count("torch sees no CUDA device") == 4


def test_declined_problems_are_counted(small, monkeypatch, tmp_path, capsys):
    from peftkern.dispatch.choose import Declined

    right = accuracy.run_ours

    def picky(problem, *args):
        if problem.dtype == torch.float32:
            raise Declined("PEFTKERN_BACKEND=x cannot take op[cpu: a=1]: no kernel for fp32")
        return right(problem, *args)

    monkeypatch.setattr(accuracy, "run_ours", picky)
    file = tmp_path / "v.json"
    run = ["--backend", "reference", "--json", str(file)]
    assert verify.main([*run, "--problems", "2", "--dtype", "fp32", "fp16"]) == 0
    assert "1 problems declined, the first: no kernel for fp32" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert [r["dtype"] for r in written["declined"]] == ["fp32"] and {r["dtype"] for r in written["rows"]} == {"fp16"}
    # Nothing was checked: no success.
    assert verify.main([*run, "--problems", "2", "--dtype", "fp32"]) == 1


def test_a_preferred_back_end_takes_what_it_can(small, monkeypatch):
    """Rows count for a preferred back end only if it took a part of the problem."""
    import dataclasses
    import functools
    import types

    from peftkern.dispatch import choose, registry
    from peftkern.problem import CpuWay
    from peftkern.settings import using

    target = verify.targets(["cuda"], None, device="cuda")[0]
    assert target.preferred == "cuda" and target.environment["PEFTKERN_BACKEND"] == "auto"
    # The CPU back end stands for it, with a part of the op.
    target, cpu = dataclasses.replace(target, device="cpu", preferred="cuda"), choose.load("cpu")
    ops = {
        "lora_linear_fwd": functools.partial(cpu.OPS["lora_linear_fwd"], way=CpuWay(kind="vendor", strided="vendor"))
    }
    named = types.SimpleNamespace(OPS=ops, BASES=cpu.BASES, unavailable=cpu.unavailable, decline=cpu.decline)
    monkeypatch.setitem(choose.ORDER, "cpu", ("cuda",))
    for module in (choose, registry):
        monkeypatch.setattr(module, "load", lambda name: named)
    with using(gpu="a test's"), target.active():
        rows = verify.check_one(target, "fp32:7")
    assert rows and all(r["output"] != verify.DECLINED and r["ok"] for r in rows)
    named.decline = lambda problem, now: "too odd"
    with using(gpu="another test's"), target.active():
        (row,) = verify.check_one(target, "fp32:7")
    assert row["output"] == verify.DECLINED and "too odd" in row["error"]


def test_strides_survive_a_move():
    from peftkern.testing.problems import LAYOUTS, laid_out

    values = torch.randn(6, 5)
    for layout in LAYOUTS:
        x = laid_out(values, layout)
        copy = accuracy.spread(x, "cpu")
        assert copy.stride() == x.stride() and copy.data_ptr() != x.data_ptr() and torch.equal(copy, x)
    gaps = accuracy.spread(laid_out(values, "row_stride"), "cpu")
    assert gaps.as_strided((5, 8), (8, 1))[:, 5:].isnan().all()
    assert accuracy.spread(torch.empty(0, 3), "cpu").shape == (0, 3)


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
    args = verify.parser().parse_args(["--problem", "fp32:1:large", "bf16:2", "fp16:3"])
    triton = verify.targets(["triton"], None)[0]
    assert verify.chosen(args, triton) == ["fp16:3"]
    with pytest.raises(ValueError, match="large"):
        verify.named("fp32:1:large", **verify.INTERPRETED)


@pytest.mark.parametrize("name", ["fp32", "fp33:1", "fp32:x", "fp32:1:huge"])
def test_bad_names(name):
    with pytest.raises(ValueError, match="DTYPE:SEED"):
        verify.named(name)


def test_a_back_end_that_is_asked_for_but_not_usable_is_an_error(monkeypatch):
    monkeypatch.setattr(verify.Target, "reason", lambda self: "for this test")
    assert verify.main(["--problems", "1", "--backend", "cpu"]) == 1


def test_verify_needs_no_package_for_its_text(monkeypatch, capsys):
    """Plain text, with progress, where rich is not installed."""
    monkeypatch.setitem(sys.modules, "rich", None)
    assert verify.main(["--device", "cpu", "--problems", "3", "--backend", "reference", "--dtype", "fp32"]) == 0
    out = capsys.readouterr().out
    assert "worst error over its bound" in out and " gone" in out and "0 failures" in out and "\x1b" not in out

"""scripts/gpu_validate.sh without a GPU, its resumption, and the report that it prints."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts/gpu_validate.sh"

_spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "scripts/gpu_report.py")
report = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(report)

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_accuracy" name="test_random_problem[a]"><properties>
<property name="backend" value="cuda"/><property name="problem" value="bf16:3"/><property name="dtype" value="bf16"/>
<property name="adapters" value="fp32"/><property name="output" value="y"/><property name="ratio" value="0.5"/>
</properties></testcase>
<testcase classname="tests.gpu.test_accuracy" name="test_random_problem[b]"><properties>
<property name="backend" value="triton"/><property name="problem" value="fp16:4"/><property name="dtype" value="fp16"/>
<property name="adapters" value="fp16"/><property name="output" value="dB"/><property name="ratio" value="1.25"/>
</properties><failure message="AssertionError: dB: 1.25 of its bound">a long text</failure></testcase>
<testcase classname="tests.gpu.test_x" name="test_s"><skipped message="no nvcc"/></testcase>
<testcase classname="tests.gpu.test_x" name="test_t"><skipped message="no nvcc"/></testcase>
<testcase classname="tests.gpu.test_x" name="test_e"><error message="boom"/></testcase>
</testsuite></testsuites>"""


# All that may come out: at most eight files.
FILES = {f"{n}.json" for n in ("build", "tests", "tune", "bench", "decode", "summary")} | {"log"}


def run(out: Path, *arguments: str, python: str = sys.executable) -> tuple[int, str]:
    environment = os.environ | {"PYTHON": python}
    done = subprocess.run(
        [SCRIPT, out, *arguments], capture_output=True, text=True, env=environment, cwd=out.parent, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow(60)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: run the script itself")
def test_dry_run(tmp_path):
    pytest.importorskip("peftkern._C", reason="the dry run takes the extension that is there")
    out, python = tmp_path / "out", tmp_path / "python"
    # A stage that fails: the others run all the same. Of the golden vectors, which have a test of their own, a few do.
    python.write_text(
        '#!/bin/sh\ncase "$*" in *"peftkern tune"*) exit 3 ;; *test_golden.py*) set -- "$@" -k "tile or wgmma" ;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    status, said = run(out, python=str(python))
    summary = json.loads((out / "summary.json").read_text())
    assert status == 1, said
    assert {k: v["ok"] for k, v in summary["stages"].items()} == dict(build=True, tests=True, tune=False, bench=True), (
        said
    )
    assert "torch sees no CUDA device: a dry run" in said and said.splitlines()[-1].startswith("tune: FAILED, status 3")
    # What had ended well is kept, the rest is done.
    status, said = run(out, "--dry-run")
    assert status == 0, said
    assert [line.split(":")[0] for line in said.splitlines() if "done before" in line] == [
        "== build",
        "== tests",
        "== bench",
    ]
    files = {p.name: p.stat().st_size for p in out.iterdir()}
    assert set(files) == FILES
    assert max(files.values()) < 1_000_000
    summary = json.loads((out / "summary.json").read_text())
    assert (
        summary["ok"] and summary["dry_run"] and "timing" in summary["not_run"] and f"not run: {report.NOT_RUN}" in said
    )
    tests = json.loads((out / "tests.json").read_text())
    assert tests["collected"] > 300 and tests["counts"]["passed"] >= 4 and not tests["failures"]
    for name in ("bench", "decode"):
        plan = json.loads((out / f"{name}.json").read_text())
        assert plan["cases"] and any(p.startswith("peftkern") for p in plan["providers"])
    assert any(
        "8192x4096x14336 R=16 adapters=fp32 dropout=0.1" in c
        for c in json.loads((out / "bench.json").read_text())["cases"]
    )


@pytest.mark.parametrize(
    "arguments",
    [(), ("a", "b"), ("a", "--only"), ("a", "--only", "everything"), ("a", "--fast"), ("a", "--only", "build,all"),
     ("a", "--only", ","), ("--only", "build", "tests"), ("a", "--only", "--dry-run")],
)  # fmt: skip
def test_wrong_use(tmp_path, arguments):
    done = subprocess.run(
        [SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHON": sys.executable}
    )
    assert done.returncode == 2 and "Usage: scripts/gpu_validate.sh OUTDIR" in done.stderr
    assert not list(tmp_path.iterdir())


def idle(folder: Path) -> str:
    """A Python that does nothing but keep account of the stages."""
    python = folder / "python"
    real = "*gpu_report.py\\ stage*|*gpu_report.py\\ current*|*gpu_report.py\\ summary*"
    python.write_text(f'#!/bin/sh\ncase "$*" in {real}) exec {sys.executable} "$@" ;; esac\n')
    python.chmod(0o755)
    return str(python)


def test_a_stage_that_is_named_runs_in_any_case(tmp_path):
    out, python = tmp_path / "out", idle(tmp_path)
    run(out, python=python)
    _, said = run(out, python=python)
    assert said.count("done before") == 4 and "at most" not in said
    _, said = run(out, "--only", "tune", python=python)
    assert "== tune (at most" in said and "done before" not in said and "== tests" not in said


@pytest.mark.parametrize(
    "arguments, stages",
    [
        (("--only", "tests", "build"), ["build", "tests"]),
        (("--only", "tune,bench"), ["tune", "bench"]),
        (("--only", "tune,build", "bench", "--dry-run"), ["build", "tune", "bench"]),
        (("--only", "tests"), ["tests"]),
        ((), ["build", "tests", "tune", "bench"]),
    ],
)
def test_only_takes_several_stages(tmp_path, arguments, stages):
    """Which stages are run, in what order, and what comes out."""
    out = tmp_path / "out"
    status, said = run(out, *arguments, python=idle(tmp_path))
    ran = [line.split()[1] for line in said.splitlines() if line.startswith("== ")]
    assert ran == stages, said
    assert set(json.loads((out / "summary.json").read_text())["stages"]) == set(stages)
    assert {p.name for p in out.iterdir()} <= FILES


def _limits(*, dry: int = 0, **spent: int) -> dict[str, int]:
    """The limit of each stage; ``spent``: seconds that the one before it took."""
    function = re.search(r"^limit\(\) \{.*?^\}", SCRIPT.read_text(), re.M | re.S)[0]
    calls = "; ".join(f"SPENT={spent.get(name, 0)}; limit {name}" for name in report.STAGES)
    done = subprocess.run(["bash", "-c", f"DRY={dry}\n{function}\n{calls}"], capture_output=True, text=True, check=True)
    return dict(zip(report.STAGES, map(int, done.stdout.split())))


def test_two_calls_of_five_and_four_minutes():
    """Each stage is killed 5 s after its limit at the latest; beside them there are 15 s for the script itself."""
    alone = _limits()
    for first, second, seconds in (("build", "tests", 300), ("tune", "bench", 240)):
        for took in (0, 20, alone[first] // 2, alone[first] + 5):
            left = _limits(**{second: took})[second]
            assert 60 <= left <= alone[second] and took + left + 5 + 10 <= seconds
    assert sum(alone[name] for name in ("build", "tests")) > 275  # what one does not need the other may take
    assert _limits(dry=1) == {name: 8 * seconds for name, seconds in alone.items()}


def test_results_of_pytest(tmp_path):
    file = tmp_path / "junit.xml"
    file.write_text(JUNIT)
    found = report.tests(file)
    assert found["counts"] == dict(passed=1, failed=2, skipped=2) and found["skips"] == {"no nvcc": 2}
    assert [f["name"] for f in found["failures"]] == ["test_accuracy::test_random_problem[b]", "test_x::test_e"]
    assert [(r["backend"], r["ratio"]) for r in found["rows"]] == [("cuda", 0.5), ("triton", 1.25)]
    for nothing in ("", "<testsuites/>"):
        file.write_text(nothing)
        assert report.tests(file)["failures"]


def test_what_a_killed_pytest_had_done_is_kept(tmp_path):
    """A kernel that hangs: no JUnit file, but the lines of the tests before it."""
    file = tmp_path / "junit.xml"
    file.write_text("")
    Path(f"{file}.said").write_text(
        "[gw0] [  1%] PASSED tests/gpu/test_a.py::test_x[a b-1] \n[gw11] [  2%] FAILED tests/gpu/test_a.py::test_y \n"
        "[gw1] [  3%] SKIPPED tests/gpu/test_a.py::test_z \ntests/gpu/test_a.py::test_v PASSED    [ 17%]\n"
        "tests/gpu/test_a.py::test_s SKIPPED (no nvcc)     [ 27%]\ntests/gpu/test_a.py::test_w "
    )
    found = report.tests(file)
    assert found["counts"] == dict(passed=2, failed=1, skipped=2)
    assert (
        found["failures"][0]["name"] == "tests/gpu/test_a.py::test_y" and "may hang" in found["failures"][1]["message"]
    )


def test_stamps(tmp_path):
    assert not report.current(tmp_path, "tests", "k1")
    report.record(tmp_path, "tests", 0, 12, "k1")
    report.record(tmp_path, "tune", 124, 90, "k1")
    assert report.current(tmp_path, "tests", "k1") and not report.current(tmp_path, "tests", "k2")
    assert not report.current(tmp_path, "tune", "k1")


def test_the_worst_rows_come_last(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    report.save(tmp_path / "tests.json", report.tests(tmp_path / "junit.xml"))
    job = dict(
        op="lora_linear_fwd", dtype="bf16", adapter_dtype="fp32", N=4096, K=4096, R=16, dropout=True, choice="cuda"
    )
    tuned = [job | dict(M=m, over_composition=ratio) for m, ratio in ((1, 0.9), (2, 1.3), (3, 0.7), (4, None))]
    report.save(tmp_path / "tune.json", dict(rows=tuned))
    base = dict(dtype="bf16", adapter_dtype="fp32", M=8192, K=4096, N=4096, R=16, dropout=0.1)
    timed = (
        ("peftkern", "fwd_bwd", 1.2),
        ("peftkern", "fwd", 1.04),
        ("peft", "fwd", 3.0),
        ("peftkern_cuda", "fwd", None),
    )
    rows = [base | {"provider": p, "pass": w, "ratio_to_base": r} for p, w, r in timed]
    rows = [r | dict(device="cuda", median_ms=1.0, op="lora_linear") for r in rows]
    report.save(tmp_path / "bench.json", dict(rows=rows, header=dict(op="lora_linear")))
    for i, name in enumerate(("build", "tests", "tune", "bench")):
        report.record(tmp_path, name, int(name == "tests"), i, "k")
    found, lines = report.summary(tmp_path, dry=False)
    assert not found["ok"] and found["tests"]["counts"]["failed"] == 2 and found["not_run"] is None
    assert lines[-1] == "tests: FAILED, status 1, 1 s"
    assert [line.split("x addmm_")[0].strip() for line in found["tuning"]] == ["0.700", "0.900", "1.300"]
    assert [line.split("x frozen")[0].strip() for line in found["one adapter"]] == ["1.040", "1.200"]
    assert found["limits"][0].startswith("kept: bf16 8192x4096x4096: forward over the frozen linear: 1.040 (<= 1.05")
    assert (
        found["limits"][-1].startswith("MISSED: bf16 8192x4096x4096: forward + backward")
        and "1.200" in found["limits"][-1]
    )
    assert "1.25 of its bound  triton fp16 fp16:4 dB" in found["accuracy"][-1]
    text = "\n".join(lines)
    assert "FAILED test_accuracy::test_random_problem[b]: AssertionError: dB: 1.25 of its bound" in text
    assert (
        text.index("1.040x") < text.index("1.200x") < text.index("FAILED test_x::test_e") < text.index("tests: FAILED")
    )


@pytest.mark.parametrize(
    "gpu, cuda, dry, good",
    [
        (None, False, True, True),
        (None, True, False, False),
        ({"name": "X"}, False, False, False),
        ({"name": "X"}, True, False, True),
    ],
)
def test_a_gpu_machine_needs_cuda_kernels(gpu, cuda, dry, good):
    doctor = dict(versions={"torch": "2", "peft": None}, gpu=gpu, build=dict(extension="_C.so", cuda_kernels=cuda))
    text, ok = report.built(doctor, dry)
    assert ok == good and ("with CUDA kernels" in text) == cuda and "peft" not in text


def test_a_table_is_installed_where_it_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("peftkern.settings.TABLES", str(tmp_path / "tuned"))
    report.save(tmp_path / "t.json", dict(schema=1, meta=dict(gpu=dict(name="GPU X")), rows=[]))
    assert report.install(tmp_path / "t.json") == tmp_path / "tuned/gpu-x.json"
    report.save(tmp_path / "t.json", dict(schema=2, meta=dict(gpu=dict(name="GPU X")), rows=[]))
    with pytest.raises(ValueError, match="schema"):
        report.install(tmp_path / "t.json")

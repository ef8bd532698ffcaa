"""The programs in examples/ run as they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    """What an example prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow(25)
def test_serve_many_adapters():
    output = run("examples/serve_many_adapters.py", "--steps", "120", "--adapters", "40")
    lines = output.splitlines()
    assert lines[0] == "peftkern: 9 of 9 PEFT layers accelerated"
    assert lines[-1] == "every row equals its adapter run alone"
    trained = [line.split() for line in lines if line.startswith(("upward", "downward", "skip", "mirror"))]
    assert len(trained) == 15 and sum(row[-1] == "yes" for row in trained) >= 10, output


@pytest.mark.slow(25)
def test_quantised_bases(tmp_path):
    """Weights in codes are as small as they say, and the same steps over them lose about as much."""
    written = ["--json", str(tmp_path / "result.json")]
    output = run("examples/quantised_bases.py", "--steps", "3", "--pairs", "4", "--held-out", "4", *written)
    rows = {row["base"]: row for row in json.loads((tmp_path / "result.json").read_text())["rows"]}
    assert [f"{row['bits']:.2f}" for row in rows.values()] == ["32.00", "8.06", "4.50", "4.15"]
    whole, linear = rows["fp32"]["model_bytes"], 4 * 6 * 12 * 384**2
    for name, row in rows.items():
        assert f"\n  {name} " in output and min(row["median_ms"], row["accuracy"]) > 0, row
        assert row["losses"][0] == pytest.approx(rows["fp32"]["losses"][0], rel=0.25 if "NF4" in name else 0.02), row
        assert row["model_bytes"] == pytest.approx(whole - linear * (1 - row["bits"] / 32), rel=1e-3), row


@pytest.mark.slow(25)
def test_compare_methods(tmp_path):
    """Both sides of each method start equal and are all measured."""
    written = ["--json", str(tmp_path / "result.json"), "--png", str(tmp_path / "result.png")]
    output = run("examples/compare_methods.py", "--steps", "2", "--pairs", "2", "--held-out", "4", *written)
    result = json.loads((tmp_path / "result.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["LoRA", "DoRA", "(IA)^3", "bottleneck", "Compacter", "LoReFT"]
    for name, row in rows.items():
        assert f"\n  {name} " in output and row["steps"] == 2 and min(row["step_ms"].values()) > 0, row
        assert row["first_losses"]["peftkern"] == pytest.approx(row["first_losses"]["library"], abs=1e-5), row
        assert row["saved_bytes"]["peftkern"] <= row["saved_bytes"]["library"], row
        assert row["library"].startswith("PEFT" if name in ("LoRA", "DoRA", "(IA)^3") else ("adapters", "plain")), row
    hidden, layers, width = 384, 6, 48
    assert rows["bottleneck"]["trained_parameters"] == 2 * layers * (2 * hidden * width + hidden + width)
    assert (tmp_path / "result.png").stat().st_size > 10_000

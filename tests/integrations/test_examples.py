"""The programs in examples/ run as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_serve_many_adapters():
    command = [sys.executable, "examples/serve_many_adapters.py", "--steps", "120", "--adapters", "40"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "peftkern: 9 of 9 PEFT layers accelerated"
    assert lines[-1] == "every row equals its adapter run alone"
    trained = [line.split() for line in lines if line.startswith(("upward", "downward", "skip", "mirror"))]
    assert len(trained) == 15 and sum(row[-1] == "yes" for row in trained) >= 10, done.stdout

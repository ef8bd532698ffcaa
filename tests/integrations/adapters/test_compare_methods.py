"""The example that compares methods runs AdapterHub's own modules where they are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def test_the_library_is_adapters(tmp_path):
    file = tmp_path / "result.json"
    command = [sys.executable, "examples/compare_methods.py", "--methods", "bottleneck", "Compacter", "LoReFT",
               "--steps", "2", "--pairs", "2", "--held-out", "4", "--json", str(file)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in json.loads(file.read_text())["rows"]:
        assert row["library"].startswith("adapters 1.3")
        assert row["first_losses"]["peftkern"] == pytest.approx(row["first_losses"]["library"], abs=1e-5), row

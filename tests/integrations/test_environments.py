"""Runs the tests of libraries that have an environment of their own in it: ``make adapters-env``, ``make quantised-env``."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {"adapters": 70, "quantised": 55}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow(s)) for name, s in SECONDS.items()])
def test_in_its_environment(name):
    python = ROOT / f".venv-{name}/bin/python"
    if not python.exists():
        pytest.skip(f"there is no .venv-{name}: make {name}-env")
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", f"tests/integrations/{name}"]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout[-2000:]

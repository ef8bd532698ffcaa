"""Runs the files of ``interpreted/`` under ``TRITON_INTERPRET=1``, one process for each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is an optional dependency")

HERE = Path(__file__).parent
FILES = sorted((HERE / "interpreted").glob("test_*.py"))


def test_there_are_files():
    assert len(FILES) >= 3


@pytest.mark.slow(25)
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_in_the_interpreter(file):
    env = dict(os.environ, TRITON_INTERPRET="1")
    for name in ("PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS"):
        env.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", str(file)]
    result = subprocess.run(command, env=env, cwd=HERE.parents[2], capture_output=True, text=True, timeout=600)
    # 5 would be "no test was collected": the switch did not reach the process.
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout[-2000:]

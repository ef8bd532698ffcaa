"""Runs the files of ``interpreted/`` under ``TRITON_INTERPRET=1``, in a few processes: each imports torch and Triton anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is an optional dependency")

HERE = Path(__file__).parent
FILES = sorted((HERE / "interpreted").glob("test_*.py"))
PROCESSES = 2


def test_there_are_files():
    assert len(FILES) >= 3


@pytest.mark.slow(75)
@pytest.mark.parametrize("files", [FILES[i::PROCESSES] for i in range(PROCESSES)], ids=lambda files: files[0].stem)
def test_in_the_interpreter(files):
    env = dict(os.environ, TRITON_INTERPRET="1")
    for name in ("PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS"):
        env.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", *map(str, files)]
    result = subprocess.run(command, env=env, cwd=HERE.parents[2], capture_output=True, text=True, timeout=600)
    # 5 would be "no test was collected": the switch did not reach the process.
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout[-2000:]
    assert all(f"{file.name} ." in result.stdout for file in files), result.stdout[-2000:]

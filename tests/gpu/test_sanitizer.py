"""compute-sanitizer over every call, at small sizes: accesses out of bounds, races in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("calls.py")
FOUND = 86


@pytest.mark.parametrize("backend_name", ["cuda", "triton"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_finds_nothing(tool, backend_name):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    # Every tensor an allocation of its own, so that its end is a bound.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, sys.executable, str(SCRIPT), backend_name, "cuda"],
            capture_output=True, text=True, env=env, timeout=150,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} took over 150 s")
    said = done.stdout + done.stderr
    if "not supported" in said and done.returncode != FOUND:
        pytest.skip(f"compute-sanitizer: {next(line for line in said.splitlines() if 'not supported' in line)}")
    assert done.returncode == 0, said[-4000:]
    assert "runs" in done.stdout, done.stdout

"""How the CUDA kernels are launched: threads and dynamic shared memory of a block.

Only the launchers in ``csrc/cuda`` know, so they are asked: the simulator of the test suite (``tests/sim``) runs them with
every kernel, notes the most that each launch asks for, and recorded it stands in ``bounds/launches.json``.
With ``PEFTKERN_RECORD_LAUNCHES=1`` those tests write it, otherwise they fail where a launch asks for more than it says.
Shared memory is mostly the same for all sizes; where it is not, it is that of the largest problem in the tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from . import records
from .cubins import checkout, readable

NAME = "launches"
SETTING = "PEFTKERN_RECORD_LAUNCHES"


def symbols(library: Path) -> dict[int, str]:
    """Function names by address, as ``nm`` tells them."""
    done = subprocess.run(["nm", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    rows = (line.split() for line in done.stdout.splitlines())
    return {int(address, 16): readable(name) for address, kind, name in rows if kind in "tT"}


def recorded() -> dict[str, dict[str, int]]:
    """Threads and dynamic shared memory by kernel."""
    return records.read(NAME)


def ours(kernels: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Those whose source is in csrc/cuda: the simulator has kernels of its own besides."""
    text = "\n".join(file.read_text() for file in sorted((checkout() / "csrc/cuda").glob("**/*.*")))
    return {k: v for k, v in kernels.items() if re.search(rf"\b{k.partition('<')[0].rpartition('::')[2]}\b", text)}


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One of several test processes at a time."""
    folder = checkout() / "build"
    folder.mkdir(exist_ok=True)
    with open(folder / "launches.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def settle(launched: dict[str, dict[str, int]]) -> None:
    """At the end of a test session: records what was launched, or raises AssertionError if it exceeds the record."""
    launched = ours(launched)
    if os.environ.get(SETTING) == "1":
        with _alone():
            known = recorded()
            for name, most in launched.items():
                known[name] = {k: max(n, known.get(name, {}).get(k, 0)) for k, n in most.items()}
            records.write(NAME, known)
        return
    known = recorded()
    for name, most in launched.items():
        for what, n in most.items():
            was = known.get(name, most)[what]
            assert n <= was, f"{name} was launched with {n} {what}, {was} recorded: peftkern verify --static --record"


def record() -> int:
    """Runs the simulator's tests in a process of its own, to write what launches ask for. Its exit code."""
    records.write(NAME, {})
    workers = str(min(2, os.cpu_count() or 1))
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--dist", "loadgroup", "tests/sim"]
    return subprocess.run(command, cwd=checkout(), env={**os.environ, SETTING: "1"}).returncode

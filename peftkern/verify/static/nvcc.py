"""The CUDA sources as cubins, by nvcc. What was compiled is kept in ``build/cubin``, by the text that went into it."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cubins import ROOT

INCLUDES = (ROOT / "csrc", ROOT / "csrc/include")
FLAGS = ("-std=c++17", "-O3", "-cubin", "-Werror", "all-warnings", "-Xptxas", "-v")


@dataclass(frozen=True)
class Compiled:
    """``log``: what the assembler said."""

    cubin: bytes
    log: str


def architectures(source: Path) -> tuple[str, ...]:
    """What a kernel's file is compiled for, as in CMakeLists.txt: sm_90a alone, or every architecture."""
    if source.stem == "tensor_map":
        return ()  # host code
    return ("sm_90a",) if source.stem.endswith("_sm90") else ("sm_80", "sm_90", "sm_100", "sm_120")


def sources() -> list[Path]:
    """The files with kernels."""
    return [file for file in sorted((ROOT / "csrc/cuda").glob("**/*.cu")) if architectures(file)]


def nvcc() -> str | None:
    """The compiler, found as CMakeLists.txt finds it."""
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    if "CUDA_HOME" in os.environ:
        places.insert(1, os.environ["CUDA_HOME"] + "/bin/nvcc")
    return next((place for place in places if place and Path(place).is_file()), None)


def closure(source: Path, includes: Sequence[Path]) -> list[Path]:
    """A file and all files of ours that it includes, directly or not; those of another build are not found."""
    found, todo = set(), [source]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            names = re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), re.M)
            places = [[folder / name for folder in (path.parent, *includes)] for name in names]
            todo += [
                next(filter(Path.is_file, options)).resolve() for options in places if any(map(Path.is_file, options))
            ]
    return sorted(found)


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def build(source: Path, arch: str, *flags: str) -> Compiled:
    """Compile one file for one architecture. Raises RuntimeError with what nvcc said, warnings included."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc is not installed")
    command = [*FLAGS, f"-arch={arch}", *flags, *(f"-I{folder}" for folder in INCLUDES)]
    text = [file.read_text() for file in closure(source, INCLUDES)]
    state = hashlib.sha256("\0".join([_version(compiler), *command, *text]).encode()).hexdigest()[:20]
    folder = ROOT / "build/cubin"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp())
    target = folder / f"{source.stem}-{arch}-{state}.cubin"
    # One of several processes compiles a file, the others wait for it.
    with open(folder / f"{source.stem}-{arch}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target.is_file() and target.with_suffix(".log").is_file()):
            for old in folder.glob(f"{source.stem}-{arch}-*"):
                old.unlink()
            part = target.with_suffix(".part")
            done = subprocess.run([compiler, *command, str(source), "-o", str(part)], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{json.dumps([compiler, *command, str(source)])}\n{done.stderr}")
            target.with_suffix(".log").write_text(done.stderr)
            part.rename(target)
        return Compiled(target.read_bytes(), target.with_suffix(".log").read_text())

"""Wheel and source distribution: contents, installation into a fresh environment, installation without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc", "kernels", "peftkern", "benchmarks")

pytestmark = [pytest.mark.slow(20), pytest.mark.xdist_group("packaging")]

FORWARD = """
import torch, peftkern
x, w = torch.randn(5, 7), torch.randn(3, 7)
a, b = torch.randn(2, 7, requires_grad=True), torch.randn(3, 2, requires_grad=True)
y = peftkern.lora_linear(x, w, a, b, scaling=0.5)
torch.testing.assert_close(y, x @ w.T + 0.5 * (x @ a.T) @ b.T)
y.sum().backward()
assert a.grad.abs().sum() > 0
print(peftkern.__file__)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command; its whole output in the assertion if it fails."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A clean copy of what git knows: no build output, no environment."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    target = tmp_path_factory.mktemp("source")
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def distributions(source, tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, wheel); the wheel is built from the unpacked sdist, without CUDA. Whether the compiler optimises, and once more
    for each instruction set, is nothing to packaging, and most of the time: it builds as for a processor that has none."""
    out, tools = tmp_path_factory.mktemp("distributions"), tmp_path_factory.mktemp("tools")
    compiler, processor, toolchain = tools / "c++", tools / "processor.cmake", tools / "toolchain.cmake"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    processor.write_text("set(CMAKE_SYSTEM_PROCESSOR plain)\n")
    toolchain.write_text(f"set(CMAKE_PROJECT_INCLUDE {processor})\n")
    variables = dict(PEFTKERN_CUDA="OFF", CXX=str(compiler), CMAKE_TOOLCHAIN_FILE=str(toolchain))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=source, **variables)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def environment(folder: Path) -> Path:
    """Python of a new virtual environment that sees this one's packages but not its peftkern."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin/python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder.parent).strip()
    # Files of ours in there (an editable install) are not processed: only the folder itself is added.
    outer = [p for p in sys.path if Path(p).name == Path(sysconfig.get_path("purelib")).name]
    Path(site, "outer.pth").write_text("\n".join(outer) + "\n")
    return python


def install(python: Path, what: Path, cwd: Path, **variables: str) -> str:
    """pip installs into the environment of ``python``; nothing is downloaded."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    # --ignore-installed: an outer peftkern, visible through outer.pth, is not touched.
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "-v"]
    return run(*pip, "install", *options, what, cwd=cwd, **variables)


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """Python of a fresh environment in which the wheel is installed."""
    python = environment(tmp_path_factory.mktemp("wheel") / "venv")
    install(python, distributions[1], cwd=python.parent)
    return python


def test_wheel_contains_the_package_only(distributions):
    names = zipfile.ZipFile(distributions[1]).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"peftkern"}
    for wanted in ("py.typed", "cli.py", "kernels/lora_linear.py", "benchmarks/bench.py", "demo/main.py"):
        assert f"peftkern/{wanted}" in names
    assert "peftkern/verify/static/bounds/cuda.json" in names
    assert any(name.startswith("peftkern/_C.") for name in names)
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".pyc"))]


def test_sdist_contains_the_sources(distributions, source):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE", "csrc/bindings/module.cpp"}
    assert wanted <= names
    # All of it, whatever a build of one processor reads.
    files = {p.relative_to(source).as_posix() for f in SOURCES for p in (source / f).rglob("*") if p.is_file()}
    assert "csrc/cpu/base/gemm_amx.cpp" in files and files - names == set()
    assert "kernels/tl/lora_linear.py" in names and "tests/test_packaging.py" in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_installed_wheel_works(installed, tmp_path):
    code = """
import peftkern._C, peftkern.benchmarks.registry
from peftkern.verify.static import cuda
print(cuda.origin())
"""
    said = run(installed, "-c", FORWARD + code, cwd=tmp_path, PEFTKERN_BACKEND="cpu")
    file, origin = said.splitlines()[-2:]
    assert installed.parents[1] in Path(file).parents
    assert re.search("built without CUDA, and there is no source|not found", origin)
    said = run(installed.parent / "peftkern", "doctor", cwd=tmp_path)
    assert re.search("peftkern +0", said) and re.search("cpu +usable", said)


def test_installs_and_works_without_a_compiler(distributions, tmp_path):
    python = environment(tmp_path / "venv")
    said = install(python, distributions[0], cwd=tmp_path, CC="/bin/false", CXX="/bin/false")
    (line,) = (line for line in said.splitlines() if "no C++ compiler" in line)
    assert "install peftkern again with --force-reinstall" in line
    code = (
        "import peftkern.backends.cpu as cpu; from peftkern.settings import current; print(cpu.unavailable(current()))"
    )
    assert run(python, "-c", FORWARD + code, cwd=tmp_path).splitlines()[-1] not in ("", "None")

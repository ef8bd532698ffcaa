"""setup.py: when CUDA is compiled, and what is said where something is missing. Nothing is built."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch) -> dict:
    """The names of setup.py, which has been run without building anything."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.delenv("PEFTKERN_CUDA", raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def _torch(folder: Path, monkeypatch, version: str | None) -> None:
    """A torch that only has a version file; importing it fails. None: no torch at all."""
    if version is None:
        monkeypatch.setattr(sys, "path", [str(folder)])
    else:
        (folder / "torch").mkdir()
        (folder / "torch/__init__.py").write_text("raise RuntimeError('a build must not import torch')")
        (folder / "torch/version.py").write_text(version)
        monkeypatch.syspath_prepend(str(folder))
    for name in [n for n in sys.modules if n.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    "version, chosen, why",
    [
        ("__version__ = '2.13.0+cpu'\ncuda = None\n", "OFF", "torch was built without CUDA"),
        ("from typing import Optional\ncuda: Optional[str] = '13.0'\n", "AUTO", "CUDA 13.0"),
        ("cuda = None\nhip = '7.0'\n", "OFF", "torch was built without CUDA"),
        ("", "OFF", "torch was built without CUDA"),
        (None, "OFF", "no torch is seen"),
    ],
)
def test_cuda_is_compiled_only_for_a_torch_with_cuda(script, tmp_path, monkeypatch, version, chosen, why):
    _torch(tmp_path, monkeypatch, version)
    option, said = script["cuda_option"]()
    assert option == chosen and why in said


@pytest.mark.parametrize("asked, chosen", [("ON", "ON"), ("off", "OFF")])
def test_the_variable_decides_whatever_torch_is(script, tmp_path, monkeypatch, asked, chosen):
    _torch(tmp_path, monkeypatch, "cuda = None" if chosen == "ON" else "cuda = '13.0'")
    monkeypatch.setenv("PEFTKERN_CUDA", asked)
    assert script["cuda_option"]()[0] == chosen
    monkeypatch.setenv("PEFTKERN_CUDA", "maybe")
    with pytest.raises(SystemExit, match="PEFTKERN_CUDA=MAYBE is not one of"):
        script["cuda_option"]()


def test_a_missing_tool_is_named_with_the_command_that_installs_it(script, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    for name in ("cmake", "ninja"):
        with pytest.raises(SystemExit, match=f"built with {name}: /nowhere/python -m pip install '{name}'$"):
            script["required"](name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "pybind11", raising=False)
    with pytest.raises(SystemExit, match=r"pip install 'pybind11'$"):
        script["pybind11"]()
    assert script["compiler"]() is None


def test_an_old_setuptools_is_named(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"not 65.5.0: .* -m pip install 'setuptools>=77'$"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_the_test_suite_compiles_cuda_wherever_nvcc_is(tmp_path):
    """Whatever torch was built with; a PEFTKERN_CUDA of the user's own still counts."""
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    command = ["make", "-n", "-B", "-o", ".venv/.requirements"]
    for target, expected in (
        ("test", "PEFTKERN_CUDA=${PEFTKERN_CUDA:-ON} PEFTKERN_BUILD_DIR="),
        ("demo", '"building peftkern"\nPEFTKERN_BUILD_DIR='),
    ):
        done = subprocess.run(
            [*command, target], cwd=ROOT, capture_output=True, text=True, check=True,
            env={"PATH": f"{tmp_path}:/bin:/usr/bin"},
        )  # fmt: skip
        assert expected in done.stdout

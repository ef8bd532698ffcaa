"""Builds the C++ extension ``peftkern._C`` with CMake and Ninja; everything else is in pyproject.toml.

CMakeLists.txt is the only list of sources and flags. Environment variables:

- ``PEFTKERN_CUDA``: AUTO, ON or OFF. AUTO compiles the CUDA kernels, for minutes, only if the installed torch was built with
  CUDA and nvcc is found; a GPU is never looked for.
- ``PEFTKERN_CUDA_ARCHITECTURES`` ("90", or "80;90"): for fewer GPUs.
- ``PEFTKERN_BUILD_DIR``: a folder that keeps what was compiled, so that the next build, or one after an interruption, goes on
  from there.

Without a C++ compiler the package installs without the extension and runs on its PyTorch reference and on Triton. ``pip -v``
shows each step.
"""

import importlib.util
import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SETUPTOOLS = 77  # the first that knows the form in which pyproject.toml names the licence


def tool(name: str) -> str | None:
    """Path of a program, beside this Python first: a virtual environment need not be activated."""
    return shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))


def needed(what: str, package: str) -> SystemExit:
    """The error for a build tool that is absent, with the command that mends it."""
    return SystemExit(f"peftkern: the C++ extension is built with {what}: {sys.executable} -m pip install '{package}'")


def required(name: str) -> str:
    path = tool(name)
    if path is None:
        raise needed(name, name)
    return path


def pybind11() -> str:
    """Folder of pybind11's CMake files."""
    if importlib.util.find_spec("pybind11") is None:
        raise needed("pybind11", "pybind11")
    command = [sys.executable, "-m", "pybind11", "--cmakedir"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def compiler() -> str | None:
    """The C++ compiler that CMake will use: $CXX or the first of the usual names. None if it does not run."""
    named = os.environ.get("CXX")
    for name in [named.split()[0]] if named else ["c++", "g++", "clang++"]:
        path = tool(name)
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    return None


def compiler_command() -> str:
    """How to get a C++ compiler here."""
    if platform.system() == "Darwin":
        return "xcode-select --install"
    ways = {"apt-get": "g++", "dnf": "gcc-c++", "apk": "g++", "pacman": "gcc", "zypper": "gcc-c++"}
    verb = {"apk": "add", "pacman": "-S"}
    return next(
        (f"{m} {verb.get(m, 'install')} {p}" for m, p in ways.items() if shutil.which(m)), "install g++ or clang"
    )


def torch_cuda() -> str | None:
    """The CUDA release that the installed torch was built with: None for a CPU or ROCm build, and without torch.

    Read from torch's version file: importing torch takes seconds, and a build must not need it.
    """
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    return runpy.run_path(str(file)).get("cuda") if file and file.is_file() else None


def cuda_option() -> tuple[str, str]:
    """(PEFTKERN_CUDA for CMake, why)."""
    asked = os.environ.get("PEFTKERN_CUDA", "AUTO").upper()
    if asked not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"peftkern: PEFTKERN_CUDA={asked} is not one of AUTO, ON, OFF")
    if asked != "AUTO":
        return asked, f"PEFTKERN_CUDA={asked}"
    if release := torch_cuda():
        return "AUTO", f"torch was built with CUDA {release}: CUDA kernels if nvcc is found"
    what = "torch was built without CUDA" if importlib.util.find_spec("torch") else "no torch is seen by this build"
    return "OFF", f"{what}: no CUDA kernels (PEFTKERN_CUDA=ON builds them all the same)"


class CMakeBuild(build_ext):
    """One CMake build per extension; the library lands where setuptools looks for it."""

    def build_extension(self, ext):
        cuda, why = cuda_option()
        if platform.system() == "Windows" or compiler() is None:
            if cuda == "ON":
                raise SystemExit("peftkern: PEFTKERN_CUDA=ON needs a C++ compiler on Linux or macOS, and nvcc")
            self.warn(
                "peftkern: WARNING: no C++ compiler found; installing without the C++ extension (slower on CPU). To have "
                f"it: {compiler_command()}, then install peftkern again with --force-reinstall --no-deps"
            )
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(os.environ.get("PEFTKERN_BUILD_DIR") or Path(self.build_temp, "cmake")).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake = required("cmake")
        # Ninja's and CMake's paths change with every isolated build; a cache of another one would fail.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={required('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11()}", f"-DPEFTKERN_CUDA={cuda}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}", f"-DPEFTKERN_SUFFIX={target.name.split('.', 1)[1]}",
        ]  # fmt: skip
        if architectures := os.environ.get("PEFTKERN_CUDA_ARCHITECTURES"):
            configure.append(f"-DPEFTKERN_CUDA_ARCHITECTURES={architectures}")
        print(f"peftkern: {why}", flush=True)
        environment = {"NINJA_STATUS": "[%f of %t, %e s] "} | os.environ
        for command in (configure, [cmake, "--build", str(build)]):
            if (code := subprocess.run(command, cwd=ROOT, env=environment).returncode) != 0:
                raise SystemExit(f"peftkern: `{' '.join(command[:3])} ...` failed with exit status {code} (see above)")


if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
    raise needed(f"setuptools {SETUPTOOLS} or later, not {setuptools.__version__}", f"setuptools>={SETUPTOOLS}")
# optional: without a compiler there is no file to copy, and that is no error.
setup(ext_modules=[Extension("peftkern._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})

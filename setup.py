"""Builds the C++ extension ``peftkern._C`` with CMake and Ninja; everything else is in pyproject.toml.

CMakeLists.txt is the only list of sources and flags. ``PEFTKERN_CUDA`` (AUTO, ON or OFF; an environment variable) looks
for nvcc, never for a GPU; ``PEFTKERN_CUDA_ARCHITECTURES`` ("90", or "80;90") builds for fewer GPUs. Without a C++
compiler the package installs without the extension and runs on its PyTorch reference and on Triton.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str | None:
    """Path of a program, beside this Python first: a virtual environment need not be activated."""
    return shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))


def required(name: str) -> str:
    path = tool(name)
    if path is None:
        raise SystemExit(f"peftkern: {name} is needed to build the C++ extension: pip install {name}")
    return path


def compiler() -> str | None:
    """The C++ compiler that CMake will use: $CXX or the first of the usual names. None if it does not run."""
    named = os.environ.get("CXX")
    for name in [named.split()[0]] if named else ["c++", "g++", "clang++"]:
        path = tool(name)
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    return None


class CMakeBuild(build_ext):
    """One CMake build per extension; the library lands where setuptools looks for it."""

    def build_extension(self, ext):
        cuda = os.environ.get("PEFTKERN_CUDA", "AUTO").upper()
        if cuda not in ("AUTO", "ON", "OFF"):
            raise SystemExit(f"peftkern: PEFTKERN_CUDA={cuda} is not one of AUTO, ON, OFF")
        if platform.system() == "Windows" or compiler() is None:
            if cuda == "ON":
                raise SystemExit("peftkern: PEFTKERN_CUDA=ON needs a C++ compiler on Linux or macOS, and nvcc")
            self.warn("peftkern: WARNING: no C++ compiler found; installing without the C++ extension (slower on CPU)")
            return
        pybind11 = subprocess.run(
            [sys.executable, "-m", "pybind11", "--cmakedir"], check=True, capture_output=True, text=True
        ).stdout.strip()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        cmake = required("cmake")
        # Ninja's and CMake's paths change with every isolated build; a cache of another one would fail.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={required('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11}", f"-DPEFTKERN_CUDA={cuda}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}", f"-DPEFTKERN_SUFFIX={target.name.split('.', 1)[1]}",
        ]  # fmt: skip
        if architectures := os.environ.get("PEFTKERN_CUDA_ARCHITECTURES"):
            configure.append(f"-DPEFTKERN_CUDA_ARCHITECTURES={architectures}")
        for command in (configure, [cmake, "--build", str(build)]):
            if (code := subprocess.run(command, cwd=ROOT).returncode) != 0:
                raise SystemExit(f"peftkern: `{' '.join(command[:3])} ...` failed with exit status {code} (see above)")


# optional: without a compiler there is no file to copy, and that is no error.
setup(ext_modules=[Extension("peftkern._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})

"""The kernels of tests/sim/kernels built by nvcc into a shared library, and a runner of cases on a CUDA device."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "tests/sim/kernels"
INCLUDES = (ROOT / "csrc", ROOT / "csrc/include")
# Headers of instructions that sm_90 brought.
HOPPER = {f"cuda/instructions/{name}.h" for name in ("cluster", "tma", "wgmma", "mbarrier")}


def nvcc() -> str | None:
    """The compiler, found as CMakeLists.txt finds it."""
    home = os.environ.get("CUDA_HOME")
    places = os.environ.get("CUDACXX"), shutil.which("nvcc"), home and f"{home}/bin/nvcc", "/usr/local/cuda/bin/nvcc"
    return next((p for p in places if p and Path(p).is_file()), None)


def sources(arch: int) -> list[Path]:
    """Files that an architecture (90 for sm_90) can run."""
    chosen = [p for p in sorted(KERNELS.glob("**/*.cu")) if arch == 90 or not needs_hopper(p)]
    return [*chosen, *([ROOT / "csrc/cuda/common/tensor_map.cu"] if arch == 90 else [])]


def needs_hopper(source: Path) -> bool:
    """Whether a file uses what sm_90 brought."""
    return bool(HOPPER & set(re.findall(r'#include "([^"]+)"', source.read_text())))


def launchers(source: Path) -> list[str]:
    """Names of the functions that a file exports."""
    return re.findall(r"PEFTKERN_EXPORT const char\* (\w+)\(", source.read_text())


def build(folder: Path, arch: int) -> Path:
    """The library for one architecture, and beside it (``.log``) what nvcc and the assembler said; made again only if a
    source has changed. RuntimeError if nvcc fails."""
    files = sources(arch)
    texts = [p.read_bytes() for p in (*files, *sorted((ROOT / "csrc/cuda").glob("**/*.h")))]
    name = f"instructions-sm{arch}-{hashlib.sha256(b''.join(texts)).hexdigest()[:16]}"
    library = folder / f"{name}.so"
    if library.is_file() and library.with_suffix(".log").is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    target = "90a" if arch == 90 else str(arch)
    flags = ["-std=c++17", "-O2", "-Xcompiler", "-fPIC", "-gencode", f"arch=compute_{target},code=sm_{target}"]
    flags += ["-Xptxas", "-v", *(f"-I{include}" for include in INCLUDES)]

    def compile_one(source: Path) -> tuple[Path, str]:
        out = folder / f"{name}-{source.stem}.o"
        return out, _run(nvcc(), *flags, "-c", source, "-o", out)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        objects, said = zip(*pool.map(compile_one, files))
    part = library.with_suffix(f".{os.getpid()}.part")
    _run(nvcc(), "-shared", "-cudart", "static", *objects, "-o", part)
    library.with_suffix(".log").write_text("".join(said))
    part.rename(library)
    for out in objects:
        out.unlink()
    return library


def _run(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")
    return done.stderr


class DeviceRunner:
    """Runs cases on the current CUDA device, through torch's memory. Outputs start as bytes of 0xff."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))

    def put(self, array: np.ndarray):
        import torch

        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        return torch.from_numpy(raw.copy()).cuda(), array.shape, array.dtype

    def empty(self, shape, dtype):
        return self.put(
            np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)
        )

    def get(self, buffer) -> np.ndarray:
        memory, shape, dtype = buffer
        return memory.cpu().numpy().view(dtype).reshape(shape)

    def launch(self, name: str, arguments: list) -> None:
        """RuntimeError with the name of the CUDA error if a launch or a kernel failed."""
        import torch

        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        values = [_value(a) for a in arguments]
        torch.cuda.synchronize()
        error = function(*values)
        if error is not None:
            raise RuntimeError(f"{name}: {error.decode()}")
        torch.cuda.synchronize()


def _value(argument):
    if isinstance(argument, tuple):
        return ctypes.c_void_p(argument[0].data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument

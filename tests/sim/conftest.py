"""The simulator as a fixture: builds it with the C++ compiler, hands guarded buffers to kernels, runs them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pybind11
import pytest

from peftkern.backends import marshal
from peftkern.backends.cuda import native as cuda_native
from peftkern.verify.static import cuda_launches, nvcc

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/sim"
sys.path.insert(0, str(HERE))  # lora_linear_args
INCLUDES = [HERE / "include", ROOT / "csrc", ROOT / "csrc/include"]
PRODUCT = [p for p in sorted(ROOT.glob("csrc/cuda/**/*.c[up]*")) if p.name != "tensor_map.cu"]
# The extension's own bindings, as a Python module of simulated kernels.
BINDINGS = [
    *sorted(ROOT.glob("csrc/bindings/cuda/*.cpp")),
    *(ROOT / f"csrc/bindings/{n}.cpp" for n in ("quantised", "tensors")),
]
SOURCES = [*sorted(HERE.glob("src/**/*.cpp")), *sorted(HERE.glob("kernels/**/*.cu")), *PRODUCT, *BINDINGS]
FLAGS = [
    "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra",
    "-Wno-unknown-pragmas", "-Wno-psabi", "-DPEFTKERN_SIM", *(f"-I{folder}" for folder in INCLUDES),
    f"-isystem{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}",
]  # fmt: skip
PRIORITY, RANDOM = 1, 0  # as in sim/core.h


class Fault(Exception):
    """What the simulator found wrong with a launch."""


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def build(folder: Path) -> Path:
    """The library; a file is compiled unless an object made of the same text with the same flags is there."""
    compiler = _compiler()
    if compiler is None:
        pytest.skip("the CUDA simulator needs a C++ compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout

    def digest(parts: list[str], flags: list[str] = FLAGS) -> str:
        return hashlib.sha256("\0".join([version, *flags, *parts]).encode()).hexdigest()[:20]

    def run(*command: str | Path) -> None:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, f"{command}\n{done.stderr}"

    def compile_one(source: Path) -> Path:
        # What every kernel spends its time in: small, and worth the compiler's.
        flags = [*FLAGS, "-O3"] if source.parent == HERE / "src" else FLAGS
        target = folder / f"{source.stem}-{digest([p.read_text() for p in nvcc.closure(source, INCLUDES)], flags)}.o"
        if not target.is_file():
            part = target.with_suffix(".part")
            run(compiler, *flags, "-x", "c++", "-c", source, "-o", part)
            part.rename(target)
        return target

    folder.mkdir(parents=True, exist_ok=True)
    # One of several test processes builds, the others wait for it.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, SOURCES))
        library = folder / f"sim-{digest([o.name for o in objects])}.so"
        if not library.is_file():
            run(compiler, "-shared", "-o", library.with_suffix(".part"), *objects)
            library.with_suffix(".part").rename(library)
        for old in set(folder.iterdir()) - {*objects, library, folder / "lock"}:
            old.unlink()
    return library


class Memory:
    """Buffers between guard pages; what lies beside them must be intact in the end."""

    def __init__(self, library, at_end: bool):
        self.library, self._at_end, self._buffers = library, at_end, []

    def put(self, array: np.ndarray, alignment: int | None = None) -> Buffer:
        """A copy of ``array``. With ``alignment`` its end may be up to that many bytes before the guard page."""
        array = np.ascontiguousarray(array)
        buffer = self.empty(array.shape, array.dtype, alignment)
        buffer.array[...] = array
        return buffer

    def empty(self, shape, dtype, alignment: int | None = None) -> Buffer:
        """Every byte is 0xff: NaN, or -1."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        address = self.library.sim_allocate(size, alignment or dtype.itemsize, self._at_end)
        assert address
        buffer = Buffer(address, size, shape, dtype)
        self._buffers.append(buffer)
        return buffer

    def rows(self, array: np.ndarray, stride: int, first: int = 0) -> Buffer:
        """A copy of rows ``first`` and up of a matrix whose rows are ``stride`` elements apart, however far that is.

        ``address`` is that of row 0. Nothing else of the matrix exists, whatever is touched there is a fault; ``array``
        are the rows that exist.
        """
        rows, columns = array.shape
        each, size = array.itemsize, columns * array.itemsize
        alignment = 16 if stride * each % 16 == 0 else each
        address = self.library.sim_allocate_rows(first, rows, size, stride * each, alignment)
        assert address
        buffer = Buffer(address + first * stride * each, (rows - 1) * stride * each + size, -1, array.dtype)
        buffer.address = address
        buffer.array = np.lib.stride_tricks.as_strided(buffer.array, array.shape, (stride * each, each))
        buffer.array[...] = array
        self._buffers.append(buffer)
        return buffer

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.array = None
        intact = [self.library.sim_release(b.address) for b in self._buffers]
        self._buffers = []
        if not all(intact):
            raise Fault("something was written beside a buffer")


class Buffer:
    """Memory that kernels get; ``array`` is a numpy view of it."""

    def __init__(self, address: int, size: int, shape, dtype):
        self.address, self.size = address, size
        raw = (ctypes.c_uint8 * size).from_address(address)
        self.array = np.frombuffer(raw, dtype=dtype).reshape(shape) if size else np.empty(shape, dtype)


class Simulator:
    """Runs launchers of the library under a schedule."""

    def __init__(self, path: Path):
        self._path = path
        self.library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
        loader = importlib.machinery.ExtensionFileLoader("peftkern_sim", str(path))
        # The functions that peftkern._C has for GPUs, on memory of the host.
        self.module = importlib.util.module_from_spec(importlib.util.spec_from_loader("peftkern_sim", loader))
        loader.exec_module(self.module)
        self.library.sim_allocate.restype = ctypes.c_void_p
        self.library.sim_allocate.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
        self.library.sim_allocate_rows.restype = ctypes.c_void_p
        self.library.sim_allocate_rows.argtypes = [ctypes.c_size_t] * 5
        self.library.sim_release.argtypes = [ctypes.c_void_p]
        self.library.sim_written_before.argtypes = [ctypes.c_void_p]
        self.library.sim_configure.argtypes = [ctypes.c_uint64, *[ctypes.c_int] * 2, *[ctypes.c_uint] * 2]

    def launches(self) -> dict[str, dict[str, int]]:
        """By kernel, the most that launches so far have asked for: threads and dynamic shared memory of a block."""
        rows = (ctypes.c_uint64 * (3 * 4096))()
        count = self.library.sim_launches(rows, 4096)
        names = cuda_launches.symbols(self._path)
        return {
            names[rows[3 * i]]: {"threads": rows[3 * i + 1], "shared": rows[3 * i + 2]} for i in range(count)
        }  # fmt: skip

    @contextlib.contextmanager
    def memory(self, at_end: bool = True):
        memory = Memory(self.library, at_end)
        try:
            yield memory
        except BaseException:
            with contextlib.suppress(Fault):
                memory.close()
            raise
        memory.close()

    def written_before(self, buffer: Buffer) -> None:
        """The launch before the next one writes ``buffer``: a dependent launch may touch it behind grid_wait alone."""
        self.library.sim_written_before(buffer.address)

    def configure(self, seed=0, mode: tuple[int, int] = (PRIORITY, RANDOM), resident: int = 0, last: int = 0) -> None:
        """The schedule of the launches that follow. ``last``: of a larger grid only so many clusters run, the last ones."""
        self.library.sim_configure(seed, *mode, resident, last)

    def run(self, name: str, *arguments, **how):
        """Calls a launcher with buffers, integers, None or ctypes values; raises Fault if a launch failed."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        values = []
        for a in arguments:
            if isinstance(a, Buffer):
                values.append(ctypes.c_void_p(a.address))
            elif isinstance(a, int):
                values.append(ctypes.c_int64(a))
            else:
                values.append(a)
        self.configure(**how)
        error = function(*values)
        if error is not None:
            raise Fault(error.decode())


@pytest.fixture(scope="session")
def compiled() -> list[Path]:
    """The files that the simulator is made of."""
    return SOURCES


@pytest.fixture(scope="session")
def sim():
    """The simulator, with every kernel in it. In the end, what launches asked for is held against what is recorded."""
    folder = ROOT / "build/sim"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"peftkern-sim-{os.getuid()}"
    simulator = Simulator(build(folder))
    yield simulator
    cuda_launches.settle(simulator.launches())


class Watched:
    """A module whose calls are noted."""

    def __init__(self, module):
        self._module, self.calls = module, []

    def __getattr__(self, name: str):
        function = getattr(self._module, name)

        def call(*args):
            self.calls.append(name)
            return function(*args)

        return call


@pytest.fixture
def simulated(sim, monkeypatch):
    """The simulator's module in place of the extension. Its memory comes from torch.empty, poisoned."""
    assert marshal.set_up(sim.module, None, exports=False) is None
    sim.configure()
    module = Watched(sim.module)
    monkeypatch.setattr(cuda_native, "_C", module)
    return module


@pytest.fixture(params=(80, 90), ids=("sm_80", "sm_90"))
def device(request, simulated, monkeypatch):
    """The back end on a simulated device with few multiprocessors; its architecture."""
    monkeypatch.setattr(cuda_native, "device", lambda t: cuda_native.Device(request.param, 3))
    monkeypatch.setattr(cuda_native, "on_device", lambda t: contextlib.nullcontext())
    monkeypatch.setattr(cuda_native, "stream", lambda t: 0)
    monkeypatch.setattr(cuda_native, "capturing", lambda: False)
    monkeypatch.setattr(cuda_native, "kept_counters", {})
    monkeypatch.setattr(cuda_native, "kept_addresses", {})
    yield request.param
    assert not any(c.any() for c in cuda_native.kept_counters.values()), "counters are not ready for the next launch"

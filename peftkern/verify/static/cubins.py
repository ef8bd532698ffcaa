"""What a cubin holds: registers, memory, launch bounds and machine code of every kernel in it.

Read with cuobjdump and nvdisasm, which come with the CUDA toolkit and with Triton. In a checkout what was read is kept
in ``build/static``, by the cubin's content.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import disassembly, loops, sass

ROOT = Path(__file__).resolve().parents[3]
# On every multiprocessor since sm_90 a block's first KiB belongs to the system, and resource usage counts it.
RESERVED = 1024
_USAGE = re.compile(r"^\s*Function (\S+):\s*\n.*?REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.M)
_INFO = re.compile(r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.\w|\Z)", re.M | re.S)
_THREADS = re.compile(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s*\w+\s+Value:\s*(0x\w+) (0x\w+) (0x\w+)")
_TOOLKIT = re.compile(rb"Cuda compilation tools, release ([\d.]+)")
_ARCH = re.compile(rb"-arch[ =](sm_\w+)")  # the assembler's arguments, which it notes


@dataclass(frozen=True)
class Kernel:
    """``shared``: static bytes, without the system's. ``threads``: launch bounds, 0 if it has none."""

    name: str
    arch: str
    compiler: str
    registers: int
    stack: int
    local: int
    shared: int
    threads: int
    mix: dict[str, int]
    loops: tuple[loops.MainLoop, ...]


def checkout() -> Path | None:
    """The root of the source tree; None if the package is installed without it."""
    return ROOT if (ROOT / "CMakeLists.txt").is_file() and (ROOT / "csrc/cuda").is_dir() else None


@functools.cache
def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: Triton's copy, which is the newest as a rule, on PATH, or in CUDA_HOME."""
    places = [shutil.which(name), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/{name}"]
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        places.insert(0, str(Path(spec.origin).parent / "backends/nvidia/bin" / name))
    return next((p for p in places if p and Path(p).is_file()), None)


def unavailable() -> str | None:
    """Why no cubin can be read here."""
    missing = [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]
    return f"{' and '.join(missing)} not found (in Triton's wheel and in the CUDA toolkit)" if missing else None


def run(name: str, *arguments: str | Path) -> str:
    """What a program of the toolkit prints. Raises RuntimeError if it fails."""
    done = subprocess.run([tool(name), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name} {arguments[-1]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def extract(library: Path, folder: Path) -> list[Path]:
    """The cubins inside an executable or library, written to a folder."""
    done = subprocess.run(
        [tool("cuobjdump"), "-xelf", "all", str(library.resolve())], cwd=folder, capture_output=True, text=True
    )
    # Of a library without device code it says so, and fails.
    if done.returncode != 0 and "does not contain device code" not in done.stderr + done.stdout:
        raise RuntimeError(f"cuobjdump {library}: {done.stderr.strip()}")
    return sorted(folder.glob("*.cubin"))


@functools.cache
def readable(mangled: str) -> str:
    """``sgmv_kernel<bf16, float>`` for a C++ symbol: no namespaces, no parameters. A C name stays as it is."""
    if not mangled.startswith("_Z"):
        return mangled
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    pointer = library.__cxa_demangle(mangled.encode(), None, None, ctypes.byref(status))
    if not pointer:
        return mangled
    text = ctypes.string_at(pointer).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(pointer))
    text = text.replace("(anonymous namespace)::", "").replace("peftkern::", "").replace("cuda::", "")
    depth, end = 0, len(text)
    for at, sign in enumerate(text):  # up to the parameters: the first parenthesis outside of <>
        depth += {"<": 1, ">": -1}.get(sign, 0)
        if sign == "(" and depth == 0:
            end = at
            break
    return text[:end].removeprefix("void ").strip()


def _reading(cubin: bytes, described: str, functions: list[sass.Function]) -> list[dict]:
    usage = {m[1]: [int(n) for n in m.groups()[1:]] for m in _USAGE.finditer(described)}
    bounds = {
        m[1]: functools.reduce(lambda a, b: a * int(b, 16), t.groups(), 1)
        for m in _INFO.finditer(described) if (t := _THREADS.search(m[2]))
    }  # fmt: skip
    noted = _ARCH.search(cubin)
    arch = noted[1].decode() if noted else f"sm_{disassembly.architecture(described)}"
    toolkit = _TOOLKIT.search(cubin)
    found = []
    for function in functions:
        registers, stack, shared, local = usage[function.name]
        reserved = RESERVED if int(re.search(r"\d+", arch)[0]) >= 90 and shared >= RESERVED else 0
        found.append(dict(
            name=readable(function.name), arch=arch, compiler=toolkit[1].decode() if toolkit else "?",
            registers=registers, stack=stack, local=local, shared=shared - reserved,
            threads=bounds.get(function.name, 0), mix=sass.mix(function),
            loops=[dataclasses.asdict(loop) for loop in loops.main_loops(function)],
        ))  # fmt: skip
    return found


def _readings(cubins: list[bytes]) -> list[list[dict]]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{i}.cubin") for i in range(len(cubins))]
        for file, cubin in zip(files, cubins):
            file.write_bytes(cubin)
        described = [run("cuobjdump", "-res-usage", "-elf", file) for file in files]
        code = disassembly.functions(files, described, run)
    return [_reading(*one) for one in zip(cubins, described, code)]


@functools.cache
def _readers() -> bytes:
    """Changes with whatever decides what is read from a cubin."""
    own = [Path(m.__file__).read_bytes() for m in (sass, loops, disassembly)] + [Path(__file__).read_bytes()]
    return b"\0".join([*own, *(run(name, "--version").encode() for name in ("cuobjdump", "nvdisasm"))])


def _kept(root: Path | None, cubin: bytes) -> Path | None:
    """Where a checkout keeps what was read."""
    return root and root / "build/static" / (hashlib.sha256(_readers() + cubin).hexdigest()[:24] + ".json")


def read(*cubins: bytes) -> list[list[Kernel]]:
    """The kernels of each cubin, in its order. Raises RuntimeError if the tools can't read one."""
    root = checkout()
    files = [_kept(root, cubin) for cubin in cubins]
    there = [file.read_text() if file and file.is_file() else None for file in files]
    unread = [i for i, text in enumerate(there) if text is None]
    rows = [json.loads(text) if text else [] for text in there]
    for i, found in zip(unread, _readings([cubins[i] for i in unread])):
        rows[i], file = found, files[i]
        if file and os.access(root, os.W_OK):
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(found))
            part.rename(file)
    return [[Kernel(**{**r, "loops": tuple(loops.MainLoop(**x) for x in r["loops"])}) for r in own] for own in rows]

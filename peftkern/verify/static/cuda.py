"""The CUDA kernels that the audit reads, and what they are launched with.

First choice are the cubins inside ``peftkern._C``: what users run, and reading them needs no nvcc. In a checkout whose
extension has none, or is older than its sources, the sources are compiled instead. Threads and dynamic shared memory
come from cuda_launches.py.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import cubins, cuda_launches, nvcc, records
from .records import Row

BOUNDS = "cuda"


@dataclass(frozen=True)
class Origin:
    """Where cubins come from; each is made when it is asked for."""

    name: str
    cubins: tuple[Callable[[], bytes], ...]


def extension() -> Path | None:
    """The file of peftkern._C, if it is installed."""
    spec = importlib.util.find_spec("peftkern._C")
    return Path(spec.origin) if spec and spec.origin else None


def stale(library: Path) -> Path | None:
    """A source that is newer than the extension."""
    root = cubins.checkout()
    files = [f for part in ("cuda", "include/peftkern") for f in (root / "csrc" / part).glob("**/*.*")] if root else []
    return next((f for f in sorted(files) if f.stat().st_mtime > library.stat().st_mtime), None)


def _embedded(library: Path) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return [file.read_bytes() for file in cubins.extract(library, Path(folder))]


def origin() -> Origin | str:
    """The kernels to read, or why there are none."""
    if reason := cubins.unavailable():
        return reason
    library = extension()
    held = _embedded(library) if library else []
    newer = stale(library) if held else None
    as_built = tuple(functools.partial(bytes, cubin) for cubin in held)
    if held and not newer:
        return Origin(library.name, as_built)
    why = f"{library.name} is older than {newer.name}" if newer else "peftkern._C was built without CUDA"
    missing = "source" if cubins.checkout() is None else "nvcc" if nvcc.nvcc() is None else None
    if missing:
        return (
            Origin(f"{library.name}, {why}", as_built) if held else f"{why}, and there is no {missing} to compile them"
        )
    todo = [(source, arch) for source in nvcc.sources() for arch in nvcc.architectures(source)]
    return Origin(f"csrc/cuda by nvcc, because {why}", tuple(functools.partial(_compiled, *one) for one in todo))


def _compiled(source: Path, arch: str) -> bytes:
    return nvcc.build(source, arch).cubin


def rows(*made: Callable[[], bytes]) -> list[Row]:
    """The kernels of cubins, which are read together (``disassembly.py``), with the launches that are known."""
    launched = cuda_launches.recorded()
    found = cubins.read(*(cubin() for cubin in made))
    return [row(kernel, launched.get(kernel.name)) for kernels in found for kernel in kernels]


def row(kernel: cubins.Kernel, launch: dict[str, int] | None) -> Row:
    """A kernel as it is launched: ``launch`` has its threads and dynamic shared memory."""
    return Row(
        f"{kernel.arch} {kernel.name}", kernel.name, kernel.arch, f"nvcc {kernel.compiler}", kernel.threads,
        kernel.registers, kernel.stack, kernel.local, kernel.shared, launch and launch["shared"], kernel.mix,
        kernel.loops, launch["threads"] if launch else 0,
    )  # fmt: skip


def problems(row: Row, recorded: dict[str, dict]) -> list[str]:
    """Everything that is wrong with a kernel. ``recorded``: its bounds by compiler."""
    found = records.always(row) + records.hopper(row)
    if row.dynamic is None:
        found.append("no launch of it is recorded: nothing in tests/sim starts it, or --record has not been run since")
    return found + records.broken(row, recorded)


def absent(rows: list[Row], recorded: dict[str, dict]) -> list[str]:
    """Bounds of kernels that are not there any more, among the architectures that are."""
    archs, there = {r.arch for r in rows}, {r.key for r in rows}
    return [
        f"{key}: bounds of a kernel that is gone" for key in recorded if key.split()[0] in archs and key not in there
    ]

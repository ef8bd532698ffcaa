"""A Triton launch, compiled ahead of time for a GPU that need not be there, and what came out.

Compiler and assembler get what a GPU of that architecture would give them: types, constants, divisibility by 16. What
the compiler made is read from its PTX, what the assembler made from the cubin. Triton must not be in its interpreter
(``unavailable`` says so).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from peftkern.kernels import configs, launch

from . import cubins
from .ptx import Access, accesses
from .records import Row, always

VERSION = re.match(r"\d+\.\d+\.\d+", triton.__version__)[0]
ARCHS = (80, 90, 100)
NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip


def unavailable() -> str | None:
    """Why nothing can be compiled in this process."""
    if triton.knobs.runtime.interpret:
        return "nothing is compiled under TRITON_INTERPRET=1"
    return cubins.unavailable()


@contextlib.contextmanager
def own_cache() -> Iterator[None]:
    """Compiled kernels are kept in this checkout, one folder for each state of its kernels.

    Triton's own cache, which all checkouts of a user share, asks neither where a kernel's source lies nor on which lines
    the functions stand that it calls. Both are read here in what was compiled.
    """
    state = hashlib.sha256()
    for file in sorted(Path(launch.__file__).resolve().parent.rglob("*.py")):
        state.update(file.read_bytes())
    root = cubins.checkout()
    folder = root / "build/triton" if root else Path(tempfile.gettempdir()) / f"peftkern-triton-{os.getuid()}"
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(folder / state.hexdigest()[:16])
    try:
        yield
    finally:
        os.environ.pop("TRITON_CACHE_DIR")
        if before is not None:
            os.environ["TRITON_CACHE_DIR"] = before


@contextlib.contextmanager
def captured() -> Iterator[list[launch.Launch]]:
    """The launches inside, none of which runs."""
    taken: list[launch.Launch] = []
    before, launch.submit = launch.submit, taken.append
    try:
        yield taken
    finally:
        launch.submit = before


def values(item: launch.Launch) -> dict[str, Any]:
    """The run-time arguments by name, fields of a tuple ``w`` as ``w.field``."""
    found = {}
    for name, value in item.args.items():
        fields = value._asdict() if isinstance(value, tuple) else {}
        found |= {f"{name}.{field}": v for field, v in fields.items()} if fields else {name: value}
    return found


def tensors(item: launch.Launch) -> dict[str, torch.Tensor]:
    """The tensor arguments by name; that of a descriptor is its base."""
    found = {k: v.base if isinstance(v, TensorDescriptor) else v for k, v in values(item).items()}
    return {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}


def aligned(t: torch.Tensor) -> bool:
    """Whether its first element is where 16 bytes may be read at once. Memory itself is given out so."""
    return t.storage_offset() * t.element_size() % 16 == 0


class _Types:
    """What becomes of the arguments: a type each, and by path (of a tuple's field: two places) constants and attributes."""

    def __init__(self) -> None:
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], list] = {}

    def constant(self, path: tuple[int, ...], value: Any) -> str:
        """It is compiled in."""
        self.constants[path] = value
        return "constexpr"

    def of(self, path: tuple[int, ...], value: Any, special: bool) -> Any:
        """The type of a run-time argument."""
        if isinstance(value, tuple):
            return type(value)(*(self.of((*path, i), v, special) for i, v in enumerate(value)))
        whole = type(value) is int
        if value is None or isinstance(value, tl.constexpr) or (special and whole and value == 1):
            return self.constant(path, value)
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{NAMES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
        tensor = isinstance(value, torch.Tensor)
        if aligned(value) if tensor else special and whole and value % 16 == 0:
            self.attributes[path] = [["tt.divisibility", 16]]
        return "*" + NAMES[value.dtype] if tensor else "i32" if isinstance(value, int) else "fp32"


def source(item: launch.Launch) -> ASTSource:
    """What Triton's own launcher would compile: types, constants, and divisibility by 16 where the value has it."""
    types, signature = _Types(), {}
    for i, parameter in enumerate(item.kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = types.constant((i,), item.constants[name])
        else:
            signature[name] = types.of((i,), item.args[name], not parameter.do_not_specialize)
    return ASTSource(item.kernel, signature, types.constants, types.attributes)


def key(item: launch.Launch, arch: int) -> str:
    """Names the compiled variant: kernel, tile sizes and switches, the arguments present, and their dtypes."""
    given = values(item)
    inside = {k: v.value for k, v in given.items() if isinstance(v, tl.constexpr)}
    constants = " ".join(f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in (item.constants | inside).items())
    present = [f"{name}:{NAMES[t.dtype]}{'' if aligned(t) else '-odd'}" for name, t in tensors(item).items()]
    fixed = {p.name for p in item.kernel.params if p.do_not_specialize}
    for name, value in given.items():
        if isinstance(value, int) and name not in fixed and (value == 1 or value % 16):
            present.append(f"{name}={'1' if value == 1 else 'odd'}")
    return f"sm_{arch} {item.name} {constants} | {' '.join(present)} | warps={item.warps} stages={item.stages}"


@dataclass(frozen=True)
class Report:
    """What compiler and assembler made of a launch. ``tensor_memory``: columns of sm_100's, of which there are 512."""

    row: Row
    item: launch.Launch
    tensor_memory: int
    ptx: str
    accesses: tuple[Access, ...]

    @property
    def key(self) -> str:
        """The compiled variant's name."""
        return self.row.key

    @property
    def arch(self) -> int:
        """90 for sm_90."""
        return int(self.row.arch.removeprefix("sm_"))


_reports: dict[str, Report] = {}


def reports(items: Sequence[launch.Launch], arch: int) -> tuple[Report, ...]:
    """Compile (once per process; inside ``own_cache`` also once per state of the kernels) and read the results."""
    names = [key(item, arch) for item in items]
    new = {name: item for name, item in zip(names, items) if name not in _reports}
    target = GPUTarget("cuda", arch, 32)
    made = [triton.compile(source(item), target=target, options=item.options) for item in new.values()]
    read = cubins.read(*(compiled.asm["cubin"] for compiled in made))
    for (name, item), compiled, (kernel,) in zip(new.items(), made, read):
        row = Row(
            name, item.name, f"sm_{arch}", VERSION, kernel.threads, kernel.registers, kernel.stack, kernel.local,
            kernel.shared, compiled.metadata.shared, kernel.mix, kernel.loops,
        )  # fmt: skip
        ptx = compiled.asm["ptx"]
        _reports[name] = Report(row, item, getattr(compiled.metadata, "tmem_size", 0), ptx, accesses(ptx))
    return tuple(_reports[name] for name in names)


def fits(r: Report) -> list[str]:
    """Why it could not run as it is meant to: spills, more registers or memory than there are, float atomics."""
    found, row = always(r.row), r.row
    if row.threads != 32 * r.item.warps:
        found.append(f"{row.threads} threads, {32 * r.item.warps} were asked for")
    if row.registers > min(255, 65536 // row.threads):
        found.append(f"{row.registers} registers")
    if row.total_shared > configs.smem_bytes(r.arch):
        found.append(f"{row.total_shared} bytes of shared memory")
    if r.tensor_memory > 512:
        found.append(f"{r.tensor_memory} columns of tensor memory")
    return found


def share(r: Report, sides: str, itemsize: int) -> float:
    """Bytes of a block that each thread has. ``sides``: the constants that give the block's sizes."""
    return math.prod(r.item.constants[side] for side in sides.split()) * itemsize / (32 * r.item.warps)

"""Every Triton launch compiles ahead of time, without spills, with wide memory accesses, within recorded bounds.

The launches are those of whole ops on meta tensors of real shapes, so they are what a GPU of that architecture would be
given, divisibility hints included. Compiled code is read with the tools in Triton's wheel. Bounds are written by

    python tests/compile/test_triton_aot.py --record
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is an optional dependency")
if triton.knobs.runtime.interpret:
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from peftkern.kernels import configs, launch
from peftkern.kernels.dropout import dropout_mask
from peftkern.kernels.lora_linear import Settings, backward_input, dropout, forward
from peftkern.kernels.lora_linear_grad import Needs, backward_adapter

BOUNDS = Path(__file__).with_name("triton_bounds.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHS = (80, 90, 100)
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (1024, 1024), (5120, 5120))
ROWS = 8192
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int8: "i8"}


@dataclass(frozen=True)
class Case:
    """One op call: sizes, dtypes of activations and adapters, dropout, every optional argument or only the bias."""

    arch: int
    K: int = 4096
    N: int = 4096
    M: int = ROWS
    R: int = 16
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32
    p: float = 0.1
    everything: bool = False
    base: str = "fused"


def capture(case: Case) -> list[launch.Launch]:
    """The launches of forward, adapter gradients, input gradient and mask, none of which runs."""

    def empty(*shape, dtype=case.dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def vector(size):
        return empty(size, dtype=torch.float32) if case.everything else None

    M, K, N, R = case.M, case.K, case.N, case.R
    x, dy, weight = empty(M, K), empty(M, N), empty(N, K)
    A, B = empty(R, K, dtype=case.adapter_dtype), empty(N, R, dtype=case.adapter_dtype)
    u = empty(M, R, dtype=torch.float32)
    seed, drop, settings = empty(1, dtype=torch.int64), None, Settings(case.arch)
    drop = dropout(case.p, seed)
    full = case.everything
    taken: list[launch.Launch] = []
    before, launch.submit = launch.submit, taken.append
    try:
        with configs.override(base=case.base):
            forward(
                x,
                weight,
                A,
                B,
                empty(N),
                2.0,
                drop,
                vector(R),
                vector(K),
                vector(K),
                vector(N),
                vector(N),
                full,
                settings,
            )
            needs = Needs(True, True, full, full, full, full, full)
            h = dy if full else None
            backward_adapter(dy, x, u, h, A, B, 2.0, drop, vector(R), vector(K), vector(N), needs, settings)
            backward_input(dy, u, x if full else None, weight, A, drop, vector(K), vector(K), vector(N), full, settings)
        dropout_mask(seed, M, K, 0.1)
    finally:
        launch.submit = before
    return taken


def source(item: launch.Launch) -> ASTSource:
    """What Triton's own launcher would compile: types, constants, and divisibility by 16 where the value has it."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(item.kernel.params):
        name = parameter.name
        value = item.constants[name] if parameter.is_constexpr else item.args[name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{NAMES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + NAMES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if special and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(item.kernel, signature, constants, attributes)


@dataclass(frozen=True)
class Report:
    """What the assembler made of a launch. ``opcodes``: count by full opcode."""

    key: str
    kernel: str
    registers: int
    stack: int
    local: int
    shared: int
    opcodes: collections.Counter

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches."""
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))


def key(item: launch.Launch, arch: int) -> str:
    """Names the compiled variant: kernel, tile sizes and switches, the arguments present, and their dtypes."""
    constants = " ".join(f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in item.constants.items())
    present = []
    for name, value in item.args.items():
        if isinstance(value, (torch.Tensor, TensorDescriptor)):
            base = value.base if isinstance(value, TensorDescriptor) else value
            present.append(f"{name}:{NAMES[base.dtype]}")
        elif isinstance(value, int) and (value == 1 or value % 16):
            present.append(f"{name}={'1' if value == 1 else 'odd'}")
    return f"sm_{arch} {item.name} {constants} | {' '.join(present)} | warps={item.warps} stages={item.stages}"


_reports: dict[str, Report] = {}


def report(item: launch.Launch, arch: int) -> Report:
    """Compile (once per process; Triton also keeps a cache on disk) and read the result."""
    made = source(item)
    digest = f"{made.hash()} {sorted(item.options.items())} {arch}"
    if digest not in _reports:
        compiled = triton.compile(made, target=GPUTarget("cuda", arch, 32), options=item.options)
        # Triton would refuse to start it; the assembler turns it into a trap.
        assert compiled.metadata.tmem_size <= 512 if arch == 100 else True, f"{key(item, arch)}: tensor memory"
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "kernel.cubin")
            Path(file).write_bytes(compiled.asm["cubin"])
            usage, sass = (
                subprocess.run([TOOLS / tool, option, file], capture_output=True, text=True, check=True).stdout
                for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
            )
        numbers = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
        opcodes = collections.Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass, re.M))
        assert sum(opcodes.values()) > 50, f"the disassembly of {item.name} was not understood: {sass[:500]}"
        _reports[digest] = Report(
            key(item, arch), item.name, numbers["REG"], numbers["STACK"], numbers["LOCAL"],
            compiled.metadata.shared, opcodes,
        )  # fmt: skip
    return _reports[digest]


@functools.cache
def reports(case: Case) -> tuple[Report, ...]:
    """One per launch of the case, in order."""
    return tuple(report(item, case.arch) for item in capture(case))


def standard_cases(arch: int) -> list[Case]:
    """bf16, both adapter dtypes, five shapes; K1 with its own product and around the vendor's."""
    return [
        Case(arch, K, N, adapter_dtype=adapter_dtype, base=base)
        for K, N in SHAPES
        for adapter_dtype in (torch.float32, torch.bfloat16)
        for base in ("fused", "epilogue")
    ]


def more_cases(arch: int) -> list[Case]:
    """Few rows, no dropout, a larger rank, every optional argument."""
    few = Case(arch, M=16, base="epilogue")
    return [
        few,
        Case(arch, p=0.0),
        Case(arch, R=64),
        Case(arch, everything=True),
        Case(arch, everything=True, base="epilogue"),
    ]


def case_id(case: Case) -> str:
    """Short name of a parameter."""
    adapter = NAMES[case.adapter_dtype]
    return (
        f"sm_{case.arch}-{case.M}x{case.K}x{case.N}-r{case.R}-{adapter}-p{case.p}-{case.base}{'-all' * case.everything}"
    )


CASES = [
    *(case for arch in ARCHS for case in standard_cases(arch)),
    *(pytest.param(case, marks=pytest.mark.slow) for case in more_cases(90)),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_no_spills(case):
    for r in reports(case):
        spilled = r.count("STL|LDL")
        assert (r.local, r.stack, spilled) == (0, 0, 0), f"{r.key}: {r.registers} registers, {r.stack} bytes of stack"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_memory_accesses_are_wide(case):
    kernels = collections.Counter(r.kernel for r in reports(case))
    assert kernels["expand_kernel"] == 2 and kernels["adapter_grad_kernel"] == 2 and kernels["shrink_kernel"] >= 1
    for r in reports(case):
        if r.kernel not in ("expand_kernel", "adapter_grad_kernel", "shrink_kernel"):
            continue
        # Big operands travel by bulk copy, by 16-byte asynchronous copy or by 16-byte load. Nothing is copied narrower.
        wide = r.count(r"UTMALDG") + r.count(r"LDGSTS.*\.128") + r.count(r"LDG\..*\.128")
        assert wide > 0 and r.count(r"LDGSTS") == r.count(r"LDGSTS.*\.128"), r.key
        # Results are stored 16 bytes at a time; a column sum or a saved vector may be narrow.
        stores, narrow = r.count(r"STG"), r.count(r"STG") - r.count(r"STG.*\.128")
        assert stores > 0 and narrow <= (2 if case.everything else 0), f"{r.key}: {r.opcodes}"


@pytest.mark.parametrize("case", [c for c in CASES if isinstance(c, Case) and c.base == "fused"], ids=case_id)
def test_matrix_instructions(case):
    expected = {80: r"HMMA\.16816\.F32", 90: r"HGMMA\.64x(128|256)x16\.F32", 100: r"UTCHMMA"}[case.arch]
    for r in reports(case):
        if r.kernel == "expand_kernel":
            assert r.count(expected) > 0, f"{r.key}: {r.opcodes}"
            if case.arch >= 90:
                assert r.count("UTMALDG") > 0 and r.count("HMMA") == 0, r.key
        elif r.kernel in ("shrink_kernel", "adapter_grad_kernel"):
            assert r.count(expected.split(r"\.")[0]) > 0, f"{r.key}: {r.opcodes}"


def recorded() -> dict:
    """The committed bounds."""
    return json.loads(BOUNDS.read_text())


@pytest.mark.skipif(
    BOUNDS.exists() and recorded()["triton"] != triton.__version__,
    reason="bounds were recorded with another version of Triton",
)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_registers_and_shared_memory_within_recorded_bounds(case):
    bounds = recorded()["bounds"]
    for r in reports(case):
        assert r.key in bounds, f"no bound for {r.key}"
        registers, shared = bounds[r.key]
        assert r.registers <= registers and r.shared <= shared, f"{r.key}: {r.registers} registers, {r.shared} bytes"


def test_shared_memory_fits_the_device():
    bounds = recorded()["bounds"]
    assert len(bounds) > 50
    for name, (registers, shared) in bounds.items():
        arch = int(re.match(r"sm_(\d+)", name)[1])
        assert registers <= 255 and shared <= configs.smem_bytes(arch), name


def record() -> None:
    """Write what is measured now, registers rounded up to a multiple of 8 (they are allocated so)."""
    bounds = {}
    for case in [*(c for arch in ARCHS for c in standard_cases(arch)), *more_cases(90)]:
        with contextlib.suppress(KeyboardInterrupt):
            for r in reports(case):
                bounds[r.key] = [min(255, -(-r.registers // 8) * 8), r.shared]
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(bounds.items()))
    BOUNDS.write_text(f'{{\n"triton": "{triton.__version__}",\n"bounds": {{\n{lines}\n}}\n}}\n')


if __name__ == "__main__" and "--record" in sys.argv:
    record()

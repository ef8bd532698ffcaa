"""Every Triton launch compiles ahead of time: without spills, with wide memory accesses, within recorded bounds.

The launches are those of whole ops on meta tensors of real shapes, so they are what a GPU of that architecture would be
given, divisibility hints included. What the compiler made is read from its PTX, what the assembler made from the cubin.
Registers and shared memory differ between versions of Triton. Their bounds are written, for the version in use, by

    python tests/compile/test_triton_aot.py --record

Another version is put in use by ``pip install --no-deps --target DIR triton==...`` and ``PYTHONPATH=DIR``.
"""

from __future__ import annotations

import collections
import functools
import json
import math
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

sys.path.insert(0, str(Path(__file__).parent))
from ptx_accesses import Access, accesses

sys.path.pop(0)

from peftkern.kernels import configs, launch
from peftkern.kernels.dropout import dropout_mask
from peftkern.kernels.lora_linear import Settings, backward_input, dropout, forward
from peftkern.kernels.lora_linear_grad import Needs, backward_adapter

BOUNDS = Path(__file__).with_name("triton_bounds.json")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
VERSION = re.match(r"\d+\.\d+\.\d+", triton.__version__)[0]
ARCHS = (80, 90, 100)
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (1024, 1024), (5120, 5120))
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int8: "i8"}
# The block of each tensor argument, by the names of the constants that give its sides; a vector has one side.
TILES = {
    "expand_kernel": {
        "out": "BLOCK_M BLOCK_N", "base": "BLOCK_M BLOCK_N", "factor": "BLOCK_M BLOCK_N", "x": "BLOCK_M BLOCK_K",
        "w": "BLOCK_N BLOCK_K", "v": "BLOCK_M RANK", "b": "BLOCK_N RANK", "bias": "BLOCK_N", "out_scale": "BLOCK_N",
        "column_scale": "BLOCK_N", "partial": "BLOCK_N", "in_scale": "BLOCK_K", "rank_scale": "RANK", "seed": "",
    },
    "shrink_kernel": {
        "u": "BLOCK_M RANK", "x": "BLOCK_M BLOCK_K", "a": "RANK BLOCK_K", "in_scale": "BLOCK_K", "seed": "",
    },
    "adapter_grad_kernel": {
        "t": "BLOCK_M BLOCK_C", "h": "BLOCK_M BLOCK_C", "v": "BLOCK_M RANK", "parts": "BLOCK_M RANK",
        "b": "BLOCK_C RANK", "grad": "BLOCK_C RANK", "sums": "BLOCK_C", "products": "BLOCK_C", "v_scale": "RANK",
        "b_scale": "BLOCK_C", "seed": "",
    },
    "add_blocks_kernel": {
        "out": "BLOCK_M RANK", "parts": "BLOCK_M RANK", "u": "BLOCK_M RANK", "partial": "RANK", "rank_scale": "RANK",
    },
    "finish_kernel": {
        "out": "BLOCK_C RANK", "grad": "BLOCK_C RANK", "other": "BLOCK_C RANK", "scale": "BLOCK_C", "dots": "BLOCK_C",
    },
    "add_rows_kernel": {"out": "BLOCK_C", "parts": "BLOCK_M BLOCK_C"},
    "dropout_mask_kernel": {"out": "ROWS COLUMNS", "seed": ""},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call of every op: sizes, adapters' dtype, dropout, every optional argument or only the bias, K1's base."""

    arch: int
    K: int = 4096
    N: int = 4096
    M: int = 8192
    R: int = 16
    adapter_dtype: torch.dtype = torch.float32
    p: float = 0.1
    everything: bool = False
    base: str = "fused"
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        adapter = f"{NAMES[self.dtype]}-{NAMES[self.adapter_dtype]}"
        all_arguments = "-all" * self.everything
        return f"sm_{self.arch}-{self.M}x{self.K}x{self.N}-r{self.R}-{adapter}-p{self.p}-{self.base}{all_arguments}"


def standard_cases(arch: int) -> list[Case]:
    """bf16, both dtypes of adapters, five shapes; K1 with its own product and around the vendor's."""
    return [
        Case(arch, K, N, adapter_dtype=adapter_dtype, base=base)
        for K, N in SHAPES
        for adapter_dtype in (torch.float32, torch.bfloat16)
        for base in ("fused", "epilogue")
    ]


def more_cases(arch: int) -> list[Case]:
    """Few rows, no dropout, a rank that fills half a tile, a larger one, every optional argument."""
    return [
        Case(arch, M=16, base="epilogue"),
        Case(arch, p=0.0),
        Case(arch, R=8),
        Case(arch, R=64),
        Case(arch, everything=True),
        Case(arch, everything=True, base="epilogue"),
    ]


def capture(case: Case) -> list[launch.Launch]:
    """The launches of forward, adapter gradients, input gradient and mask, none of which runs."""

    def empty(*shape, dtype=case.dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def vector(size):
        return empty(size, dtype=torch.float32) if case.everything else None

    M, K, N, R = case.M, case.K, case.N, case.R
    x, dy, weight = empty(M, K), empty(M, N), empty(N, K)
    A, B = empty(R, K, dtype=case.adapter_dtype), empty(N, R, dtype=case.adapter_dtype)
    u, bias = empty(M, R, dtype=torch.float32), empty(N)
    seed, settings, full = empty(1, dtype=torch.int64), Settings(case.arch), case.everything
    drop = dropout(case.p, seed)
    needs = Needs(True, True, full, full, full, full, full)
    taken: list[launch.Launch] = []
    before, launch.submit = launch.submit, taken.append
    try:
        with configs.override(base=case.base):
            scales = vector(R), vector(K), vector(K), vector(N), vector(N)
            forward(x, weight, A, B, bias, 2.0, drop, *scales, full, settings)
            scales = vector(R), vector(K), vector(N)
            backward_adapter(dy, x, u, dy if full else None, A, B, 2.0, drop, *scales, needs, settings)
            scales = vector(K), vector(K), vector(N)
            backward_input(dy, u, x if full else None, weight, A, drop, *scales, full, settings)
        dropout_mask(seed, M, K, 0.1)
    finally:
        launch.submit = before
    return taken


def tensors(item: launch.Launch) -> dict[str, torch.Tensor]:
    """The tensor arguments by name; that of a descriptor is its base."""
    found = {k: v.base if isinstance(v, TensorDescriptor) else v for k, v in item.args.items()}
    return {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}


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


def key(item: launch.Launch, arch: int) -> str:
    """Names the compiled variant: kernel, tile sizes and switches, the arguments present, and their dtypes."""
    constants = " ".join(f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in item.constants.items())
    present = [f"{name}:{NAMES[t.dtype]}" for name, t in tensors(item).items()]
    fixed = {p.name for p in item.kernel.params if p.do_not_specialize}
    for name, value in item.args.items():
        if isinstance(value, int) and name not in fixed and (value == 1 or value % 16):
            present.append(f"{name}={'1' if value == 1 else 'odd'}")
    return f"sm_{arch} {item.name} {constants} | {' '.join(present)} | warps={item.warps} stages={item.stages}"


@dataclass(frozen=True)
class Report:
    """What compiler and assembler made of a launch. ``tensor_memory``: columns of sm_100's, of which there are 512."""

    key: str
    item: launch.Launch
    registers: int
    stack: int
    local: int
    shared: int
    tensor_memory: int
    ptx: str
    accesses: tuple[Access, ...]


_reports: dict[str, Report] = {}


def report(item: launch.Launch, arch: int) -> Report:
    """Compile (once per process; Triton also keeps a cache on disk) and read the result."""
    name = key(item, arch)
    if name not in _reports:
        compiled = triton.compile(source(item), target=GPUTarget("cuda", arch, 32), options=item.options)
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "kernel.cubin")
            Path(file).write_bytes(compiled.asm["cubin"])
            command = [CUOBJDUMP, "--dump-resource-usage", file]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        numbers = [int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")]
        ptx = compiled.asm["ptx"]
        metadata = compiled.metadata
        _reports[name] = Report(
            name, item, *numbers, metadata.shared, getattr(metadata, "tmem_size", 0), ptx, accesses(ptx)
        )
    return _reports[name]


@functools.cache
def reports(case: Case) -> tuple[Report, ...]:
    """One per launch of the case, in order."""
    return tuple(report(item, case.arch) for item in capture(case))


def parametrize(cases: list[Case], slow: tuple[Case, ...] = ()):
    """Cases of one architecture share compiled kernels, so one worker takes them all."""
    groups = {arch: pytest.mark.xdist_group(f"aot-sm_{arch}") for arch in ARCHS}
    marked = [pytest.param(c, marks=groups[c.arch]) for c in cases]
    marked += [pytest.param(c, marks=[groups[c.arch], pytest.mark.slow]) for c in slow]
    return pytest.mark.parametrize("case", marked, ids=str)


STANDARD = [case for arch in ARCHS for case in standard_cases(arch)]
MORE = tuple(case for arch in ARCHS for case in more_cases(arch))


@parametrize(STANDARD, MORE)
def test_fits_without_spills(case):
    for r in reports(case):
        assert (r.local, r.stack) == (0, 0), f"{r.key}: {r.registers} registers, {r.stack} bytes of stack"
        # Fewer than 24 registers would be a trap in place of the kernel, the assembler's answer to what it can't do.
        assert 24 <= r.registers <= min(255, 65536 // (32 * r.item.warps)), f"{r.key}: {r.registers} registers"
        assert r.shared <= configs.smem_bytes(case.arch), f"{r.key}: {r.shared} bytes of shared memory"
        assert r.tensor_memory <= 512, f"{r.key}: {r.tensor_memory} columns of tensor memory"


@parametrize(STANDARD, MORE)
def test_memory_accesses_are_wide(case):
    """Each access moves 16 bytes, or where a thread's share of the block is smaller, at least that share."""
    for r in reports(case):
        tiles, threads = TILES[r.item.name], 32 * r.item.warps
        seen = collections.Counter()
        for access in r.accesses:
            assert access.tensor in tiles, f"{r.key}: {access} is of no known argument"
            seen[access.tensor] += 1
            if access.bulk:
                continue
            elements = math.prod(r.item.constants[side] for side in tiles[access.tensor].split())
            share = elements * tensors(r.item)[access.tensor].element_size() / threads
            assert access.bytes >= min(16, share), f"{r.key}: {access}, a thread's share is {share:g} bytes"
        assert seen.keys() == tensors(r.item).keys(), f"{r.key}: accesses of {sorted(seen)}"


@parametrize([c for c in STANDARD if c.base == "fused"], tuple(c for c in MORE if c.base == "fused"))
def test_matrix_instructions(case):
    for r in reports(case):
        if r.item.name not in ("expand_kernel", "shrink_kernel", "adapter_grad_kernel"):
            continue
        # K1 takes the widest instruction that its tile allows, with both operands copied in bulk.
        wide = r.item.constants["BLOCK_N"] if r.item.name == "expand_kernel" else r"\d+"
        expected = {
            80: r"mma\.sync\.aligned\.m16n8k16\.\S*f32\.bf16\.bf16",
            90: rf"wgmma\.mma_async\.sync\.aligned\.m64n{wide}k16\.f32\.bf16\.bf16",
            100: r"tcgen05\.mma\.cta_group",
        }[case.arch]
        assert re.search(expected, r.ptx), r.key
        if case.arch >= 90:
            assert not re.search(r"\bmma\.sync", r.ptx), r.key
        if case.arch >= 90 and r.item.name == "expand_kernel":
            assert {a.tensor for a in r.accesses if a.bulk} == {"x", "w"}, r.key


def recorded() -> dict[str, dict[str, list[int]]]:
    """Registers and bytes of shared memory by variant and version of Triton."""
    return json.loads(BOUNDS.read_text())


@parametrize(STANDARD, MORE)
def test_registers_and_shared_memory_within_recorded_bounds(case):
    bounds, unknown = recorded(), 0
    for r in reports(case):
        assert r.key in bounds, f"no bound for {r.key}: run this file with --record"
        if VERSION not in bounds[r.key]:
            unknown += 1
            continue
        registers, shared = bounds[r.key][VERSION]
        assert r.registers <= registers, f"{r.key}: {r.registers} registers, {registers} were recorded"
        assert r.shared <= shared, f"{r.key}: {r.shared} bytes of shared memory, {shared} were recorded"
    if unknown:
        pytest.skip(f"registers differ between versions of Triton, and none were recorded with {VERSION}")


def test_no_bound_is_stale():
    used = {key(item, case.arch) for case in [*STANDARD, *MORE] for item in capture(case)}
    assert recorded().keys() == used, "variants have changed: run this file with --record"


def record(file: Path, measured: list[Report]) -> None:
    """Write what is measured now, registers rounded up to a multiple of 8 (they are allocated so)."""
    before, after = json.loads(file.read_text()) if file.exists() else {}, {}
    for r in measured:
        mine = {VERSION: [min(255, -(-r.registers // 8) * 8), r.shared]}
        after[r.key] = dict(sorted({**before.get(r.key, {}), **mine}.items()))
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(after.items()))
    file.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__" and "--record" in sys.argv:
    record(BOUNDS, [r for case in [*STANDARD, *MORE] for r in reports(case)])

"""The many-adapter kernels compile ahead of time: no spills, no atomics, wide accesses, within recorded bounds.

As in ``test_triton_aot.py``, whose tools these tests use. Where an adapter lies is known on the device only, so a kernel
holds two versions of what touches it, one for whole vectors and one for anything; the first must be there. Bounds, in a
file of their own, are written by

    python tests/compile/test_triton_multi_aot.py --record
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is an optional dependency")
if triton.knobs.runtime.interpret:
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))
import test_triton_aot as aot

sys.path.pop(0)

from peftkern.kernels import configs, launch, multi_lora_linear
from peftkern.kernels.lora_linear import Settings
from peftkern.kernels.multi_route import route

aot.NAMES.update({torch.int32: "i32", torch.float64: "fp64"})
BOUNDS = Path(__file__).with_name("triton_multi_bounds.json")
# Blocks of the tensors that are read or written in bulk; the others are a few numbers of a segment.
TILES = {
    "multi_shrink_kernel": {"x": "BLOCK_M BLOCK_K", "weight": "BLOCK_R BLOCK_K", "u": "BLOCK_M BLOCK_R"},
    "multi_add_spans_kernel": {"parts": "BLOCK_M BLOCK_R", "u": "BLOCK_M BLOCK_R"},
    "multi_expand_kernel": {
        "out": "BLOCK_M BLOCK_N", "base": "BLOCK_M BLOCK_N", "x": "BLOCK_M BLOCK_K", "w": "BLOCK_N BLOCK_K",
        "v": "BLOCK_M BLOCK_R", "weight": "BLOCK_N BLOCK_R", "bias": "BLOCK_N",
    },
    "multi_adapter_grad_kernel": {
        "t": "BLOCK_M BLOCK_C", "v": "BLOCK_M BLOCK_R", "weight": "BLOCK_C BLOCK_R", "parts": "BLOCK_C BLOCK_R",
    },
    "multi_finish_kernel": {"parts": "BLOCK_C BLOCK_R", "weight": "BLOCK_C BLOCK_R"},
    "multi_segment_kernel": {"ids": "BLOCK", "segments": "BLOCK"},
    "multi_address_kernel": {},
}  # fmt: skip
FEW = {"starts", "order", "table", "addresses", "scaling", "dropout_p", "seed"}


@dataclass(frozen=True)
class Case:
    """A route and one call of every op. ``bank``: adapters in one tensor, which get no gradient; else a list."""

    arch: int
    M: int = 8192
    K: int = 4096
    N: int = 4096
    R: int = 16
    slots: int = 8
    bank: bool = False
    drop: bool = True
    base: str = "vendor"
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        types = f"{aot.NAMES[self.dtype]}-{aot.NAMES[self.adapter_dtype]}"
        where = f"{'bank' if self.bank else 'list'}{self.slots}"
        return f"sm_{self.arch}-{self.M}x{self.K}x{self.N}-r{self.R}-{types}-{where}{'-drop' * self.drop}-{self.base}"


def standard_cases(arch: int) -> list[Case]:
    """Training on a list, decode from a bank of a thousand adapters, a base product in the same kernel."""
    return [
        Case(arch),
        Case(arch, R=64, adapter_dtype=torch.bfloat16),
        Case(arch, M=32, R=64, slots=1000, bank=True, drop=False, adapter_dtype=torch.bfloat16),
        Case(arch, K=2048, base="fused", adapter_dtype=torch.bfloat16),
    ]


def more_cases(arch: int) -> list[Case]:
    """Large ranks, other dtypes, a base product in the same kernel without dropout."""
    return [
        Case(arch, R=512),
        Case(arch, M=32, R=8, slots=32, drop=False, dtype=torch.float16, adapter_dtype=torch.float16),
        Case(arch, R=64, dtype=torch.float32),
        Case(arch, K=2048, R=64, drop=False, base="fused"),
    ]


def capture(case: Case) -> list[launch.Launch]:
    """The launches of route, forward, adapter gradients, input gradient and sgmv, none of which runs."""

    def empty(*shape, dtype=case.dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    M, K, N, R, slots = case.M, case.K, case.N, case.R, case.slots
    x, dy, weight, bias = empty(M, K), empty(M, N), empty(N, K), empty(N)
    if case.bank:
        weights = [empty(1 << 22, dtype=case.adapter_dtype)]
    else:
        weights = [t for _ in range(slots) for t in (empty(R, K, dtype=case.adapter_dtype),
                                                     empty(N, R, dtype=case.adapter_dtype))]  # fmt: skip
    table = empty(slots, 10, dtype=torch.int64)
    scaling, p, seed = empty(slots, dtype=torch.float32), empty(slots, dtype=torch.float64), empty(1, dtype=torch.int64)
    taken: list[launch.Launch] = []
    before, launch.submit = launch.submit, taken.append
    try:
        with configs.override(multi_base=case.base):
            order, starts = route(empty(M, dtype=torch.int64), table, 1023)
            drop = (p, seed) if case.drop else (None, None)
            batch = multi_lora_linear.batch(weights, x, table, scaling, order, starts, R, *drop, Settings(case.arch))
            _, u = multi_lora_linear.forward(batch, x, weight, N, bias)
            need = [not case.bank] * len(weights)
            du, _, _ = multi_lora_linear.backward_adapter(batch, dy, x, u, weights, need, True)
            multi_lora_linear.backward_input(batch, dy, du, weight, K)
            if not case.drop:
                multi_lora_linear.add(batch, dy, x)
    finally:
        launch.submit = before
    return taken


@functools.cache
def reports(case: Case) -> tuple[aot.Report, ...]:
    """One per launch of the case, in order."""
    return tuple(aot.report(item, case.arch) for item in capture(case))


STANDARD = [case for arch in aot.ARCHS for case in standard_cases(arch)]
MORE = tuple(case for arch in aot.ARCHS for case in more_cases(arch))


def test_every_kernel_is_among_the_launches():
    assert {item.name for case in STANDARD for item in capture(case)} == TILES.keys()


@aot.parametrize(STANDARD, MORE)
def test_fits_without_spills(case):
    for r in reports(case):
        assert (r.local, r.stack) == (0, 0), f"{r.key}: {r.registers} registers, {r.stack} bytes of stack"
        assert r.registers <= min(255, 65536 // (32 * r.item.warps)), f"{r.key}: {r.registers} registers"
        assert r.shared <= configs.smem_bytes(case.arch), f"{r.key}: {r.shared} bytes of shared memory"
        assert r.tensor_memory <= 512, f"{r.key}: {r.tensor_memory} columns of tensor memory"


@aot.parametrize(STANDARD, MORE)
def test_no_atomics(case):
    for r in reports(case):
        assert not re.search(r"\b(atom|red)\.", r.ptx), r.key


@aot.parametrize(STANDARD, MORE)
def test_memory_accesses_are_wide(case):
    """Each access of a block moves 16 bytes, or at least a thread's share of the block."""
    for r in reports(case):
        tiles, threads, widest = TILES[r.item.name], 32 * r.item.warps, {}
        given = {k: t.element_size() for k, t in aot.tensors(r.item).items()}
        if "DTYPE" in r.item.constants:
            given["weight"] = r.item.constants["DTYPE"].primitive_bitwidth // 8
        for access in r.accesses:
            name = access.tensor
            if name in FEW or r.item.name == "multi_address_kernel":
                continue
            share = math.prod(r.item.constants[side] for side in tiles[name].split()) * given[name] / threads
            wide = access.bytes >= min(16, share)
            assert wide or name == "weight", f"{r.key}: {access}, a thread's share is {share:g} bytes"
            widest[name] = widest.get(name, False) or wide
        assert all(widest.values()) and widest.keys() == tiles.keys() & given.keys(), f"{r.key}: {widest}"


@aot.parametrize(STANDARD, MORE)
def test_products_and_copies(case):
    """Matrix instructions in half precision; what a loop of them reads is copied ahead, asynchronously."""
    for r in reports(case):
        if r.item.name in ("multi_shrink_kernel", "multi_adapter_grad_kernel"):
            assert re.search(r"\bcp\.async\.c[ag]\.shared", r.ptx), r.key
        if case.dtype == torch.float32:
            continue
        if r.item.name in ("multi_shrink_kernel", "multi_expand_kernel", "multi_adapter_grad_kernel"):
            large = r.item.name == "multi_adapter_grad_kernel" or r.item.constants.get("GEMM")
            matrix = {90: r"wgmma\.mma_async", 100: r"tcgen05\.mma\.cta_group"}.get(case.arch) if large else None
            assert re.search(matrix or r"mma\.sync\.aligned\.m16n8k16", r.ptx), r.key


def recorded() -> dict[str, dict[str, list[int]]]:
    """Registers and bytes of shared memory by variant and version of Triton."""
    return json.loads(BOUNDS.read_text())


@aot.parametrize(STANDARD, MORE)
def test_registers_and_shared_memory_within_recorded_bounds(case):
    bounds, unknown = recorded(), 0
    for r in reports(case):
        assert r.key in bounds, f"no bound for {r.key}: run this file with --record"
        if aot.VERSION not in bounds[r.key]:
            unknown += 1
            continue
        registers, shared = bounds[r.key][aot.VERSION]
        assert r.registers <= registers, f"{r.key}: {r.registers} registers, {registers} were recorded"
        assert r.shared <= shared, f"{r.key}: {r.shared} bytes of shared memory, {shared} were recorded"
    if unknown:
        pytest.skip(f"registers differ between versions of Triton, and none were recorded with {aot.VERSION}")


def test_no_bound_is_stale():
    used = {aot.key(item, case.arch) for case in [*STANDARD, *MORE] for item in capture(case)}
    assert recorded().keys() == used, "variants have changed: run this file with --record"


if __name__ == "__main__" and "--record" in sys.argv:
    aot.record(BOUNDS, [r for case in [*STANDARD, *MORE] for r in reports(case)])

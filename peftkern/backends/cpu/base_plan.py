"""Who computes the base product on CPU, and in which blocks: pure functions of sizes, dtype, CPU and settings.

- ``vendor``: torch's own matrix product, written in the output's dtype.
- ``panels``: ours (csrc/cpu/base/gemm.cpp). Half precision is widened while packing, the product is fp32, and the
  epilogue rounds once. A row's bits depend on (C, dtype) alone, so this is also the batch-invariant product.
- ``bf16``: ours for bf16 on CPUs with AVX512-BF16 (csrc/cpu/base/gemm_bf16.cpp), fp32 panels of the result as well. It
  takes the place of ``panels`` there, unless the input has a scale.
- ``few``: ours for few rows (csrc/cpu/base/few.cpp), one pass over W.

Nothing here times anything: a noisy measurement would change bits from run to run. A committed table of this CPU model
(cpu_base_table) names the fastest kind. Where it has none, fp32 is the vendor's: which of two good products is faster
differs from model to model. Half precision then follows rules, for a vendor's product without instructions for it is slower
than ours by factors; their thresholds were measured on 2 cores of an AMD EPYC (Zen 5).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ... import settings
from . import base_table as tables
from .native import _C

# Whatever the layer, the scratch of one product stays under this.
SCRATCH_BYTES = 64 << 20
# Elements of an fp32 panel of the output: 4 MB stay in a last-level cache, and a call per panel is not felt.
_PANEL = 1 << 20
_PANEL_COLS = 1024
# What one thread computes at a time. Packing is repeated for every block, so it is about 1 % per 1,024 columns (for a)
# and 3 % per 1,024 rows (for W, which is transposed); larger blocks leave threads idle at the end.
_BLOCK_ROWS, _BLOCK_COLS = 1024, 512
_ALIGN = 32  # columns; a multiple of every level's tile, and of what the branch kernel needs
_FEW_SCRATCH = 4 << 20  # floats of fp32 copies of a


class Plan(NamedTuple):
    """How a product is computed. ``rows`` x ``cols`` is the panel that the epilogue gets at a time."""

    kind: str
    rows: int
    cols: int
    block_rows: int = 1
    block_cols: int = 1
    scratch: int = 0  # floats, without the panel
    panel: int = 0  # floats

    @property
    def bytes(self) -> int:
        """All scratch of the product."""
        return 4 * (self.scratch + self.panel)


class Cpu(NamedTuple):
    """What the choice depends on besides the problem: C++ level in use, features beyond it, and what was measured."""

    isa: str
    features: frozenset[str]
    table: tables.Table | None = None


def model() -> tables.CpuModel:
    """Which CPU this is."""
    return tables.CpuModel(*_C.cpu_model())


def level() -> tables.Level:
    """The instruction sets in use, and whose fp32 product torch has."""
    return tables.Level(_C.isa(), torch.backends.cpu.get_cpu_capability(), torch.backends.mkl.is_available())


@functools.cache
def _cpu(isa: str) -> Cpu:
    found = frozenset(_C.features())
    if _C.base_gemm_bf16_usable():
        found |= {"bf16_kernel"}
    if isa != "avx512" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        found &= {"x86", "intel", "bf16_kernel"}
    table = tables.of_model(model())
    return Cpu(isa, found, table if table is not None and tables.applies(table, level()) else None)


def cpu() -> Cpu:
    """This CPU, held to ``PEFTKERN_CPU_ISA``."""
    return _cpu(_C.isa())


def vendor_is_fast(dtype: torch.dtype, on: Cpu) -> bool:
    """Whether torch's product of many rows beats ours, where no table says so."""
    if "x86" not in on.features or dtype == torch.float32:
        return True  # not measured: leave it to torch
    if dtype == torch.bfloat16:
        return bool(on.features & {"avx512_bf16", "amx_bf16"})
    # torch's fp16: 33 GFLOP/s forward and 1 backward on AVX-512 without AMX-FP16.
    return "amx_fp16" in on.features


def pairs_are_fast(M: int, D: int, C: int, on: Cpu) -> bool:
    """Whether our kernel on AVX512-BF16 beats torch's product and the pass over its result."""
    # Zen 5: 690 to 720 GFLOP/s at any size, torch's 770 down to 560 as W grows. Intel has AMX, or its own library.
    # With 512 rows of 4096 x 4096 torch's is ahead by more than that pass.
    return M > 512 and D * C >= 1 << 23 and not on.features & {"intel", "amx_bf16"}


def few_rows(dtype: torch.dtype, transpose: bool, on: Cpu) -> int:
    """Most rows for which one pass over W beats the alternatives in half precision; for fp32, which is ours only where a
    table or a setting says so, the most it takes. W 4096 x 4096, not in cache, two threads."""
    if "x86" not in on.features:
        return 0
    if on.isa == "plain":
        return 0 if dtype == torch.float32 else 8
    if dtype != torch.float32 and vendor_is_fast(dtype, on):
        if "amx_bf16" in on.features or dtype == torch.float16:
            return 4  # not measured: where the bytes of W are surely all that counts
        # bf16 on AVX512-BF16. Forward: 8 rows 1.25 ms, torch 1.30; 16 rows 1.9 and 1.6. Input gradient: 32 rows 3.2 and
        # 3.9; 48 rows 6.2 and 5.8.
        return 8 if transpose else 32
    # Forward: ours wins up to the most it takes (fp16, AVX-512: 7.0 ms, panels 9.5). Input gradient: packing W for the
    # panels needs no transposition, so they win earlier (fp16, AVX-512: 48 rows 6.3 and 6.4).
    if transpose or dtype == torch.float32:
        return _C.base_few_rows
    return 48 if on.isa == "avx512" else 32


def choose(
    dtype: torch.dtype, transpose: bool, M: int, D: int, C: int, unit_stride: bool, on: Cpu, setting: str,
    invariant: bool, *, scaled: bool = False,
) -> str:  # fmt: skip
    """The kind for a (M, C) x (C, D) product. ``unit_stride``: W is adjacent along C or D; ``scaled``: a has a scale."""
    pairs = dtype == torch.bfloat16 and not scaled and "bf16_kernel" in on.features
    panels = "bf16" if pairs else "panels"
    if invariant:
        return panels
    if setting == "vendor":
        return "vendor"
    few = unit_stride and M <= _C.base_few_rows and M * (C + _ALIGN) <= _FEW_SCRATCH
    if setting == "auto" and on.table is not None:
        for kind in tables.fastest(on.table, dtype, transpose, M, D, C):
            if kind in ("vendor", panels) or (few and kind == "few"):
                return kind
    if dtype == torch.float32 and setting == "auto":
        return "vendor"
    if few and few_rows(dtype, transpose, on) >= M:
        return "few"
    if dtype == torch.float32 and D < 16 and "x86" in on.features:
        # Narrow: MKL sums in lanes, shorter chains than ours, and is twice as fast.
        return "vendor"
    if setting == "panels" or not vendor_is_fast(dtype, on) or (pairs and pairs_are_fast(M, D, C, on)):
        return panels
    return "vendor"


def of_call(a: torch.Tensor, weight: torch.Tensor, transpose: bool, *, scaled: bool = False) -> str:
    """The kind for ``a W^T`` if ``transpose``, else for ``a W``, under the settings of now; a (M, C), weight (N, K)."""
    N, K = weight.shape
    D, C = (N, K) if transpose else (K, N)
    now, unit = settings.current(), 1 in weight.stride()
    return choose(
        a.dtype, transpose, a.shape[0], D, C, unit, cpu(), now.cpu_base, now.batch_invariant, scaled=scaled
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def blocks(kind: str, M: int, D: int, C: int, threads: int) -> Plan:
    """The plan of ``kind``; M, D, C >= 1. ``Plan.bytes`` never exceeds SCRATCH_BYTES."""
    if kind == "vendor":
        return Plan(kind, M, D)
    return Plan(kind, *_C.base_blocks(kind, M, D, C, threads))


def describe() -> dict[str, dict[str, str]]:
    """For the doctor: {dtype: {"forward" | "input gradient": what computes it on this CPU, for a W of 4096 x 4096}}."""
    on, now = cpu(), settings.current()
    words = {
        "vendor": "torch's product",
        "panels": "peftkern, fp32 panels",
        "bf16": "peftkern, bf16 pairs",
        "few": "peftkern, one pass over W",
    }
    found: dict[str, dict[str, str]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        passes = found[str(dtype).removeprefix("torch.")] = {}
        for name, transpose in (("forward", True), ("input gradient", False)):
            last: dict[int, str] = {}  # the most rows of each stretch: its kind
            for M in range(1, 4097):
                kind = choose(dtype, transpose, M, 4096, 4096, True, on, now.cpu_base, now.batch_invariant)
                if last and last[M - 1] == kind:
                    del last[M - 1]
                last[M] = kind
            *stretches, end = last.items()
            text = [f"up to {M} rows {words[kind]}; " for M, kind in stretches]
            passes[name] = "".join(text) + ("else " if text else "") + words[end[1]]
    return found


def measured() -> str:
    """For the doctor: the table of this CPU model, or why there is none."""
    table = tables.of_model(model())
    if table is None:
        return "none for this CPU model, so fp32 is torch's (`peftkern bench --tune --device cpu` measures one)"
    words = f"{table.name}, measured {table.meta['date'][:10]} with {table.meta['threads']} threads"
    if not tables.applies(table, level()):
        was, now = (" ".join(map(str, each)) for each in (table.meta["level"].values(), level()))
        return f"{words}, not used: it holds for {was}, in use are {now}"
    return words

"""Who computes the base product on CPU: a pure function of sizes, dtype, CPU and settings.

- ``vendor``: torch's own matrix product, written in the output's dtype.
- ``panels``: ours (csrc/cpu/base/gemm.cpp). Half precision is widened while packing, the product is fp32, and the
  epilogue rounds once. A row's bits depend on (C, dtype) alone, so this is also the batch-invariant product.
- ``bf16``: ours for bf16 on CPUs with AVX512-BF16 (csrc/cpu/base/gemm_bf16.cpp), fp32 panels of the result as well. It
  takes the place of ``panels`` there, unless the input has a scale.
- ``few``: ours for few rows (csrc/cpu/base/few.cpp), one pass over W.

Nothing here times anything: a noisy measurement would change bits from run to run. A committed table of this CPU model
(cpu_table) names the fastest kind. Where it has none, fp32 is the vendor's: which of two good products is faster
differs from model to model. Half precision then follows rules, for a vendor's product without instructions for it is slower
than ours by factors; their thresholds were measured on 2 cores of an AMD EPYC (Zen 5).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..problem import Problem
from ..settings import Settings
from . import cpu_table as tables
from .cpu_table import Product

_ALIGN = 32  # columns of zeros that pad a row of a
_FEW_SCRATCH = 4 << 20  # floats of fp32 copies of a
_PAIR_ROWS, _PAIR_RANKS = 32, 8  # of a bottleneck by products of bf16, at least


class Cpu(NamedTuple):
    """What the choice depends on besides the product: C++ level in use, features beyond it, and what was measured.

    ``few``: the most rows that the kernel for few rows takes.
    """

    isa: str
    features: frozenset[str]
    table: tables.Table | None = None
    few: int = 64


def this_model(isa: str) -> tuple[tables.CpuModel, tables.Level]:
    """Which CPU this is, and the levels with an instruction set (value of PEFTKERN_CPU_ISA) in use."""
    from ..backends.cpu import native

    return tables.CpuModel(*native.model()), tables.Level(*native.facts(isa)[0])


@functools.cache
def this_cpu(isa: str, folder: str) -> Cpu:
    """This CPU, held to an instruction set, with its table in ``folder``."""
    from ..backends.cpu import native

    model, level = this_model(isa)
    _, found = native.facts(isa)
    if level.isa != "avx512" or level.torch_isa != "AVX512":
        found &= {"x86", "intel", "bf16_kernel"}
    table = tables.of_model(model, folder)
    return Cpu(level.isa, found, table if table is not None and tables.applies(table, level) else None, native.FEW_ROWS)


def product_of(problem: Problem) -> Product | None:
    """The base product of a problem, None for an op without one."""
    forward = problem.op in ("lora_linear_fwd", "multi_lora_linear_fwd")
    if not forward and problem.op not in ("lora_linear_bwd", "multi_lora_linear_bwd"):
        return None
    flags, many = problem.flags, problem.op.startswith("multi_")
    there = "base" in flags if many else forward or flags & {"need_x", "need_p_b"}
    if "identity" in flags or not there:
        return None
    D, C = (problem.N, problem.K) if forward else (problem.K, problem.N)
    scale = "p_b" if forward else "g_b"  # many adapters' rows are scaled before they meet the product
    return Product(problem.dtype, forward, problem.M, D, C, scaled=scale in flags and not many)


def vendor_is_fast(dtype: torch.dtype, on: Cpu) -> bool:
    """Whether torch's product of many rows beats ours, where no table says so."""
    if "x86" not in on.features or dtype == torch.float32:
        return True  # not measured: leave it to torch
    if dtype == torch.bfloat16:
        return bool(on.features & {"avx512_bf16", "amx_bf16"})
    # torch's fp16: 33 GFLOP/s forward and 1 backward on AVX-512 without AMX-FP16.
    return "amx_fp16" in on.features


def pairs_are_fast(p: Product, on: Cpu) -> bool:
    """Whether our kernel on AVX512-BF16 beats torch's product and the pass over its result."""
    # Zen 5: 690 to 720 GFLOP/s at any size, torch's 770 down to 560 as W grows. Intel has AMX, or its own library.
    # With 512 rows of 4096 x 4096 torch's is ahead by more than that pass.
    return p.M > 512 and p.D * p.C >= 1 << 23 and not on.features & {"intel", "amx_bf16"}


def few_rows(dtype: torch.dtype, forward: bool, on: Cpu) -> int:
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
        return 8 if forward else 32
    # Forward: ours wins up to the most it takes (fp16, AVX-512: 7.0 ms, panels 9.5). Input gradient: packing W for the
    # panels needs no transposition, so they win earlier (fp16, AVX-512: 48 rows 6.3 and 6.4).
    if forward or dtype == torch.float32:
        return on.few
    return 48 if on.isa == "avx512" else 32


def choose_kind(p: Product, on: Cpu, now: Settings) -> tuple[str, str]:
    """(kind of the product, why)."""
    pairs = p.dtype == torch.bfloat16 and not p.scaled and "bf16_kernel" in on.features
    panels = "bf16" if pairs else "panels"
    few = p.unit_stride and p.M <= on.few and p.M * (p.C + _ALIGN) <= _FEW_SCRATCH
    if now.cpu_kind != "auto":
        able = {"few": few, "bf16": pairs}.get(now.cpu_kind, True)
        return now.cpu_kind if able else "panels", f"cpu_kind={now.cpu_kind} is set"
    if now.batch_invariant:
        return panels, "PEFTKERN_BATCH_INVARIANT=1: bits of a row must not depend on the batch"
    if now.cpu_base == "vendor":
        return "vendor", "PEFTKERN_CPU_BASE=vendor"
    auto = now.cpu_base == "auto"
    if auto and on.table is not None:
        near = tables.nearest(on.table, p)
        for kind in near.order if near else ():
            if kind in ("vendor", panels) or (few and kind == "few"):
                return kind, f"fastest of {on.table.name} at {near}"
    unknown = "no row of a table is near" if on.table else "this CPU has no table"
    if p.dtype == torch.float32 and auto:
        return "vendor", f"fp32, and {unknown}"
    why = f"rule for half precision: {unknown}" if auto else "PEFTKERN_CPU_BASE=panels"
    if few and few_rows(p.dtype, p.forward, on) >= p.M:
        return "few", f"{why}, few rows"
    if p.dtype == torch.float32 and p.D < 16 and "x86" in on.features:
        # Narrow: MKL sums in lanes, shorter chains than ours, and is twice as fast.
        return "vendor", f"{why}, narrow"
    if not auto or not vendor_is_fast(p.dtype, on) or (pairs and pairs_are_fast(p, on)):
        return panels, why
    return "vendor", why


BOTTLENECKS = ("bottleneck_adapter_fwd", "bottleneck_adapter_bwd")


def bottleneck_kind(problem: Problem, on: Cpu, now: Settings) -> tuple[str, str]:
    """(kind of a bottleneck's products, why): ``bf16`` as above, or ``panels``, the register kernels of a branch in fp32."""
    able = problem.dtype == problem.adapter_dtype == torch.bfloat16 and "bf16_kernel" in on.features
    if not able or "gate" in problem.flags:
        return "panels", "fp32 is what there is for this call"
    if now.cpu_kind != "auto":
        return "bf16" if now.cpu_kind == "bf16" else "panels", f"cpu_kind={now.cpu_kind} is set"
    if now.batch_invariant:
        return "panels", "PEFTKERN_BATCH_INVARIANT=1: bits of a row must not depend on the batch"
    if problem.M < _PAIR_ROWS or problem.R < _PAIR_RANKS:
        return "panels", "few rows or ranks"
    return "bf16", "twice the products of fp32"

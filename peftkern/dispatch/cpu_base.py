"""Who computes the base product on CPU: a pure function of sizes, dtype, CPU and settings.

- ``vendor``: torch's own matrix product, written in the output's dtype. Of a quantised W it is given a part at a time,
  decoded into the output's dtype; never with few rows, and only where a table says that it is fastest or a setting asks.
- ``panels``: ours (csrc/cpu/base/gemm.cpp). Half precision is widened while packing, the product is fp32, and the
  epilogue rounds once. A row's bits depend on (C, dtype) alone, so this is also the batch-invariant product.
- ``bf16``: ours for bf16 on CPUs with AVX512-BF16 (csrc/cpu/base/gemm_bf16.cpp), fp32 panels of the result as well. It
  takes the place of ``panels`` there, unless the input has a scale.
- ``amx``: ours for bf16 by AMX's tiles (csrc/cpu/base/gemm_amx.cpp), likewise; only where a table says that it is fastest.
- ``few``: ours for few rows (csrc/cpu/base/few/few.cpp), one pass over W.
- ``int8``: of a base of kind w8a8 alone, whose rows are rounded (csrc/cpu/base/gemm_int8.cpp): sums of integers, which are
  exact, for any number of rows.

Nothing here times anything: a noisy measurement would change bits from run to run. A table of this CPU model (cpu_table)
names the fastest kind. Where none speaks, fp32 is the vendor's: which of two good products is faster differs from model to
model. Half precision is ours, for a vendor's product without instructions for it is slower by factors; where there are some,
it is the vendor's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..bases.base import QUANTISED
from ..problem import Problem
from ..settings import Settings
from . import cpu_table as tables
from .cpu_table import Product

_ALIGN = 32  # columns of zeros that pad a row of a
_FEW_SCRATCH = 4 << 20  # floats of fp32 copies of a
# Names of the least ranks that are worth products of bf16: of a bottleneck, and of a branch of lora_linear.
PAIR_RANKS, BRANCH_RANKS = "ranks of a bottleneck in bf16", "ranks of a branch in bf16"


def panel_rows(half: bool, forward: bool) -> str:
    """Name of the least rows that are worth panels of a quantised W. ``half``: panels of bf16."""
    return f"rows of a quantised W, {'bf16' if half else 'fp32'} {'forward' if forward else 'input gradient'}"


class Cpu(NamedTuple):
    """What the choice depends on besides the product: C++ level in use, features beyond it, and what was measured.

    ``few``: the most rows that the kernel for few rows takes. ``least``: the least work that is worth our code, by name.
    """

    isa: str
    features: frozenset[str]
    table: tables.Table | None = None
    few: int = 64
    least: Mapping[str, int] = {}


def this_model(isa: str) -> tuple[tables.CpuModel, tables.Level]:
    """Which CPU this is, and the levels with an instruction set (value of PEFTKERN_CPU_ISA) in use."""
    from ..backends.cpu import native

    return tables.CpuModel(*native.model()), tables.Level(*native.facts(isa)[0])


@functools.cache
def this_cpu(isa: str, folders: tuple[str, ...]) -> Cpu:
    """This CPU, held to an instruction set, with its table in one of ``folders``."""
    from ..backends.cpu import native

    model, level = this_model(isa)
    _, found = native.facts(isa)
    if level.isa != "avx512" or level.torch_isa != "AVX512":
        found &= {"x86", "intel", "bf16_kernel", "amx_kernel"}
    table = tables.of_model(model, folders, level)
    return Cpu(level.isa, found, table, native.FEW_ROWS, tables.least(table, folders))


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
    coded, scaled = bool(flags & QUANTISED), scale in flags and not many
    return Product(problem.dtype, forward, problem.M, D, C, scaled=scaled, coded=coded, integers="w8a8" in flags)


def vendor_is_fast(dtype: torch.dtype, on: Cpu) -> bool:
    """Whether torch's product has instructions for the dtype; so has every CPU that is not known, and fp32."""
    if "x86" not in on.features or dtype == torch.float32:
        return True
    return bool(on.features & ({"avx512_bf16", "amx_bf16"} if dtype == torch.bfloat16 else {"amx_fp16"}))


def choose_kind(p: Product, on: Cpu, now: Settings) -> tuple[str, str]:
    """(kind of the product, why)."""
    if p.integers:
        return "int8", "x is rounded to 8 bits, which is ours alone"
    half = p.dtype == torch.bfloat16 and not p.scaled
    pairs, tiles = (half and kernel in on.features for kernel in ("bf16_kernel", "amx_kernel"))
    panels = "bf16" if pairs else "panels"
    few = p.unit_stride and p.M <= on.few and p.M * (p.C + _ALIGN) <= _FEW_SCRATCH
    able = {"vendor": True, "few": few, "panels": not pairs, "bf16": pairs, "amx": tiles}
    if now.cpu_kind != "auto":
        return now.cpu_kind if able[now.cpu_kind] else "panels", f"cpu_kind={now.cpu_kind} is set"
    if now.batch_invariant:
        return panels, "PEFTKERN_BATCH_INVARIANT=1: bits of a row must not depend on the batch"
    if p.coded and few and p.M < on.least.get(panel_rows(pairs, p.forward), 0):
        return "few", "W is quantised, and read once for few rows"
    if now.cpu_base == "vendor":
        return "vendor", "PEFTKERN_CPU_BASE=vendor"
    auto = now.cpu_base == "auto"
    able["few"] &= not p.coded
    if auto and on.table is not None:
        near = tables.nearest(on.table, p)
        for kind in near.order if near else ():
            if able[kind]:
                return kind, f"fastest of {on.table.name} at {near}"
    if p.coded:
        return panels, "W is quantised, and decoded where it is multiplied"
    unknown = "no row of a table is near" if on.table else "this CPU has no table"
    if p.dtype == torch.float32 and auto:
        return "vendor", f"fp32, and {unknown}"
    if auto and vendor_is_fast(p.dtype, on):
        return "vendor", f"the CPU has instructions for {p.dtype}, and {unknown}"
    why = f"half precision, and {unknown}" if auto else "PEFTKERN_CPU_BASE=panels"
    if few and on.isa != "plain":
        return "few", f"{why}, few rows"
    if p.dtype == torch.float32 and p.D < 16 and "x86" in on.features:
        # Narrow: MKL sums in lanes, shorter chains than ours, and is twice as fast.
        return "vendor", f"{why}, narrow"
    return panels, why


BOTTLENECKS = ("bottleneck_adapter_fwd", "bottleneck_adapter_bwd")


def bottleneck_kind(problem: Problem, on: Cpu, now: Settings) -> tuple[str, str]:
    """(kind of a bottleneck's products, why): ``bf16`` as above, or ``panels``, the register kernels of a branch in fp32."""
    able = problem.dtype == problem.adapter_dtype == torch.bfloat16 and "bf16_kernel" in on.features
    if not able or "gate" in problem.flags:
        return "panels", "fp32 is what there is for this call"
    if now.cpu_kind != "auto":
        return "bf16" if now.cpu_kind == "bf16" else "panels", f"cpu_kind={now.cpu_kind} is set"
    # By ranks and not by rows, so that bits do not depend on the batch.
    if problem.R < on.least.get(PAIR_RANKS, 0):
        return "panels", "few ranks"
    return "bf16", "twice the products of fp32"


def branch_in_bf16(problem: Problem, on: Cpu, now: Settings) -> bool:
    """Whether a branch is computed by products of bf16 (csrc/cpu/lora/pairs.h), not by register kernels in fp32."""
    able = problem.op in ("lora_linear_fwd", "lora_linear_bwd") and "bf16_kernel" in on.features
    if not able or problem.flags & {"d", "p_d", "g_d"} or {problem.dtype, problem.adapter_dtype} != {torch.bfloat16}:
        return False
    # By ranks and not by rows, so that bits do not depend on the batch.
    return problem.R >= dict(now.least).get(BRANCH_RANKS, on.least.get(BRANCH_RANKS, 0))

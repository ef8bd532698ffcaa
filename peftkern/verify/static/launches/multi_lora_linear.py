"""Every Triton launch of multi_lora_linear, and what must hold of its code: no atomics, wide accesses, products, copies.

As lora_linear.py. Where an adapter lies is known on the device only, so a kernel holds two versions of what
touches it, one for whole vectors and one for anything; the first must be there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from peftkern.kernels import configs, launch
from peftkern.kernels.call import Settings
from peftkern.kernels.multi import multi_lora_linear
from peftkern.kernels.multi.batch import Adapters, batch
from peftkern.kernels.multi.route import route
from peftkern.kernels.multi.tiles import COLUMNS
from peftkern.kernels.quantised.codes import Quantised

from ..triton import ARCHS, NAMES, Report, captured, fits, share, tensors

SYMBOLS = ("d", "p_b", "p_d", "g_b", "g_d", "beta")
BOUNDS = "triton_multi_lora_linear"
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
    "multi_scale_rows_kernel": {"out": "BLOCK_M BLOCK_C", "t": "BLOCK_M BLOCK_C"},
    "multi_column_sums_kernel": {
        "p": "BLOCK_M BLOCK_C", "q": "BLOCK_M BLOCK_C", "v": "BLOCK_M BLOCK_R", "weight": "BLOCK_C BLOCK_R",
    },
    "multi_segment_kernel": {"ids": "BLOCK", "segments": "BLOCK"},
    "multi_address_kernel": {},
}  # fmt: skip
FEW = {"starts", "order", "table", "addresses", "scaling", "dropout_p", "seed", "vectors", "grads", "vector"}


@dataclass(frozen=True)
class Case:
    """A route and one call of every op. ``bank``: adapters in one tensor, which get no gradient; else a list.

    ``vectors``: all that there are, of every adapter.
    """

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
    vectors: bool = False

    def __str__(self) -> str:
        types = f"{NAMES[self.dtype]}-{NAMES[self.adapter_dtype]}"
        where = f"{'bank' if self.bank else 'list'}{self.slots}"
        where += "-vectors" * self.vectors
        return f"sm_{self.arch}-{self.M}x{self.K}x{self.N}-r{self.R}-{types}-{where}{'-drop' * self.drop}-{self.base}"


def standard_cases(arch: int) -> list[Case]:
    """Training on a list, decode from a bank of a thousand adapters, a base product in the same kernel."""
    return [
        Case(arch),
        Case(arch, R=64, adapter_dtype=torch.bfloat16),
        Case(arch, M=32, R=64, slots=1000, bank=True, drop=False, adapter_dtype=torch.bfloat16),
        Case(arch, K=2048, base="fused", adapter_dtype=torch.bfloat16),
        Case(arch, vectors=True),
    ]


def more_cases(arch: int) -> list[Case]:
    """Large ranks, other dtypes, a base product in the same kernel without dropout."""
    return [
        Case(arch, R=512),
        Case(arch, M=32, R=8, slots=32, drop=False, dtype=torch.float16, adapter_dtype=torch.float16),
        Case(arch, R=64, dtype=torch.float32),
        Case(arch, K=2048, R=64, drop=False, base="fused"),
    ]


STANDARD = [case for arch in ARCHS for case in standard_cases(arch)]
MORE = (
    *(case for arch in ARCHS for case in more_cases(arch)),
    Case(120),
    Case(120, K=2048, base="fused", adapter_dtype=torch.bfloat16),
)


def capture(case: Case, weight: Quantised | None = None) -> list[launch.Launch]:
    """The launches of route, forward, adapter gradients, input gradient and sgmv, none of which runs. ``weight``: in the
    place of a dense one, of which ``base`` tells nothing."""

    def empty(*shape, dtype=case.dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    M, K, N, R, slots = case.M, case.K, case.N, case.R, case.slots
    x, dy, bias = empty(M, K), empty(M, N), empty(N)
    if case.bank:
        weights = [empty(1 << 22, dtype=case.adapter_dtype)]
    else:
        weights = [t for _ in range(slots) for t in (empty(R, K, dtype=case.adapter_dtype),
                                                     empty(N, R, dtype=case.adapter_dtype))]  # fmt: skip
    table = empty(slots, COLUMNS.value, dtype=torch.int64)
    scaling, p, seed = empty(slots, dtype=torch.float32), empty(slots, dtype=torch.float64), empty(1, dtype=torch.int64)
    settings = Settings(case.arch)
    if weight is None:
        weight, settings = empty(N, K), Settings(case.arch, fixed=configs.fixed(multi_base=case.base))
    with captured() as taken:
        order, starts = route(empty(M, dtype=torch.int64), table, 1023)
        drop = (p, seed) if case.drop else (None, None)
        vectors = [empty(max(K, N), dtype=torch.float32)] * (len(SYMBOLS) * slots * case.vectors)
        acting = frozenset(SYMBOLS * case.vectors)
        given = Adapters(weights, table, scaling, R, order, starts, *drop, vectors, acting)
        rows = batch(given, x, settings)
        _, u, h = multi_lora_linear.forward(rows, x, multi_lora_linear.Onto(N, weight), bias, case.vectors)
        wanted = multi_lora_linear.Wanted(True, True, [not case.bank] * len(weights), [True] * len(vectors))
        kept = multi_lora_linear.Kept(x, u, h if case.vectors else None)
        multi_lora_linear.backward(rows, given, dy, kept, wanted, multi_lora_linear.Onto(K, weight))
        if not case.drop:
            multi_lora_linear.add(rows, dy, x)
    return taken


def resources(r: Report) -> list[str]:
    """Spills, registers, shared memory."""
    return fits(r)


def atomics(r: Report) -> list[str]:
    """There are none."""
    return [f"{m[0]} in PTX" for m in re.finditer(r"\b(atom|red)\.", r.ptx)]


def widths(r: Report) -> list[str]:
    """Each access of a block moves 16 bytes, or at least a thread's share of the block."""
    if r.item.name == "multi_address_kernel":
        return []
    tiles, widest, found = TILES[r.item.name], {}, []
    given = {k: t.element_size() for k, t in tensors(r.item).items()}
    if "DTYPE" in r.item.constants and r.item.args.get("v", 0) is not None:  # without v no adapter is read
        given["weight"] = r.item.constants["DTYPE"].primitive_bitwidth // 8
    for access in r.accesses:
        name = access.tensor
        if name in FEW:
            continue
        mine = share(r, tiles[name], given[name])
        wide = access.bytes >= min(16, mine)
        if not wide and name != "weight":
            found.append(f"{access}, a thread's share is {mine:g} bytes")
        widest[name] = widest.get(name, False) or wide
    if not all(widest.values()) or widest.keys() != tiles.keys() & given.keys():
        found.append(f"wide accesses: {widest}")
    return found


def instructions(r: Report) -> list[str]:
    """Matrix instructions in half precision; what a loop of them reads is copied ahead, asynchronously."""
    name, found = r.item.name, []
    if name in ("multi_shrink_kernel", "multi_adapter_grad_kernel") and not re.search(
        r"\bcp\.async\.c[ag]\.shared", r.ptx
    ):
        found.append("no cp.async")
    read = tensors(r.item)
    half = next((read[k].dtype for k in ("x", "t", "out") if k in read), torch.float32) != torch.float32
    if half and name in ("multi_shrink_kernel", "multi_expand_kernel", "multi_adapter_grad_kernel"):
        large = name == "multi_adapter_grad_kernel" or r.item.constants.get("GEMM")
        matrix = {90: r"wgmma\.mma_async", 100: r"tcgen05\.mma\.cta_group"}.get(r.arch) if large else None
        expected = matrix or r"mma\.sync\.aligned\.m16n8k16"
        if not re.search(expected, r.ptx):
            found.append(f"no {expected}")
    return found


CHECKS = (resources, atomics, widths, instructions)

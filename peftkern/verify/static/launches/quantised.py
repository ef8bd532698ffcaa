"""Every Triton launch that reads a weight in codes, and what must hold of its code: wide accesses, matrix instructions.

As lora_linear.py, whose tables know the kernels and their other arguments. Kinds differ in how a tile is decoded alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from peftkern.backends.triton.operand import weight_of
from peftkern.kernels import launch
from peftkern.kernels.call import Backward, Dropout, Forward, Needs, Settings
from peftkern.kernels.lora_linear import forward
from peftkern.kernels.lora_linear_grad import backward
from peftkern.kernels.lora_row_norm import row_norm
from peftkern.testing.bases import random_base

from ..triton import ARCHS, Report, captured, fits, share, tensors, values
from . import multi_lora_linear
from .lora_linear import TILES

BOUNDS = "triton_quantised"


@dataclass(frozen=True)
class Case:
    """Both passes and the row norm. ``base``: a name of ``peftkern.testing.bases``. M decides between the kernels. ``many``:
    of multi_lora_linear, whose rows do not share a branch."""

    arch: int
    base: str = "nf4 nested"
    M: int = 64
    K: int = 4096
    N: int = 4096
    R: int = 16
    dtype: torch.dtype = torch.bfloat16
    many: bool = False

    def __str__(self) -> str:
        return f"sm_{self.arch}-{self.base.replace(' ', '-')}-{self.M}x{self.K}x{self.N}{'-many' * self.many}"


def weight(name: str, N: int, K: int):
    """A base of that name as kernels take it, without memory."""
    with FakeTensorMode():
        base = random_base(name, N, K, torch.Generator())
    parts = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in base.tensors]
    return weight_of(base.kind, parts, N, K)


def standard_cases(arch: int) -> list[Case]:
    """4 bits with scales in codes themselves, decoded where it is multiplied, also for many adapters, and by panels; 8 bits."""
    return [Case(arch), Case(arch, M=4096), Case(arch, "int8"), Case(arch, many=True)]


def more_cases(arch: int) -> list[Case]:
    """Fewest rows; many adapters over 8 bits; further ways to hold codes and scales; fp32 activations."""
    ways = ("int4 bf16", "hqq4", "fp8 by blocks", "mxfp4", "q8_0")
    return [
        Case(arch, M=16),
        Case(arch, "int8", M=16),
        Case(arch, "int8", many=True),
        Case(arch, "int8", M=4096),
        *(Case(arch, base) for base in ways),
        *(Case(arch, base, M=4096) for base in ways),
        Case(arch, M=4096, dtype=torch.float32),
    ]


STANDARD = [case for arch in ARCHS for case in standard_cases(arch)]
MORE = (*(case for arch in ARCHS for case in more_cases(arch)), *standard_cases(120))


def capture(case: Case) -> list[launch.Launch]:
    """The launches of both passes and of the row norm that read codes, none of which runs."""

    def empty(*shape, dtype=case.dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    M, K, N, R = case.M, case.K, case.N, case.R
    w = weight(case.base, N, K)
    if case.many:
        taken = multi_lora_linear.capture(
            multi_lora_linear.Case(case.arch, M, K, N, R, drop=False, dtype=case.dtype), w
        )
        return [item for item in taken if "w.codes" in tensors(item)]
    x, dy = empty(M, K), empty(M, N)
    A, B, u = (empty(*shape, dtype=torch.float32) for shape in ((R, K), (N, R), (M, R)))
    settings, drop = Settings(case.arch), Dropout(0.1, empty(1, dtype=torch.int64))
    with captured() as taken:
        forward(Forward(x, w, A, B, empty(N), 2.0, drop), settings)
        backward(Backward(dy, x, u, None, w, A, B, 2.0, drop, needs=Needs(True, True, True)), settings)
        row_norm(w, A, B, 2.0, settings)
    return [item for item in taken if "w.codes" in tensors(item)]


def _codes(r: Report) -> float:
    w = {name: value.value for name, value in values(r.item).items() if isinstance(value, tl.constexpr)}
    if w["w.RUN_BYTES"] != w["w.HALF"] or r.item.args["w"].row % 16:
        return 1  # rows, or blocks with their scales inside, begin anywhere
    # A tile that meets the product as it is lies in shared memory in pieces of 8 bytes.
    alone = w["w.RUN"] == w["w.HALF"] or w["w.LONG"]
    return 8 if alone else min(16, share(r, "BLOCK_N BLOCK_K", 1) / 2)


def widths(r: Report) -> list[str]:
    """Codes move 16 bytes at a time, or a thread's share, wherever rows of them begin at such places; the rest as beside a
    dense W. Of scales and tables a tile has a few numbers."""
    tiles, given, found = TILES.get(r.item.name, {"out": "BLOCK_N BLOCK_K"}), tensors(r.item), []
    for access in r.accesses:
        name, owner = access.tensor, access.tensor.partition(".")[0]
        if name == "w.codes":
            expected = _codes(r)
        else:
            expected = 0 if owner == "w" else min(16, share(r, tiles[name], given[name].element_size()))
        if access.bytes < expected:
            found.append(f"{access}, a thread's share is {expected:g} bytes")
    seen, full = {access.tensor for access in r.accesses}, {name for name, t in given.items() if t.numel()}
    return found + ([f"accesses of {sorted(seen)} alone"] if seen != full else [])


def instructions(r: Report) -> list[str]:
    """Products in half precision are on the tensor cores; what their loop reads is copied ahead."""
    if r.item.name != "expand_kernel" or r.item.args["out"].dtype == torch.float32:
        return []
    large = {90: r"wgmma\.mma_async", 100: r"tcgen05\.mma\.cta_group"} if r.item.constants["BLOCK_M"] >= 64 else {}
    expected = large.get(r.arch, r"mma\.sync\.aligned\.m16n8k16"), r"\bcp\.async\.c[ag]\.shared"
    return [f"no {what}" for what in expected if not re.search(what, r.ptx)]


CHECKS = (fits, widths, instructions)

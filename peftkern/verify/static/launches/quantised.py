"""Every Triton launch that reads a weight in codes, and what must hold of its code: wide accesses, matrix instructions.

As lora_linear.py, whose tables know the kernels and their other arguments. Kinds differ in how a tile is decoded alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peftkern.backends.triton.operand import weight_of
from peftkern.kernels import launch
from peftkern.kernels.call import Backward, Dropout, Forward, Needs, Settings
from peftkern.kernels.lora_linear import forward
from peftkern.kernels.lora_linear_grad import backward
from peftkern.kernels.lora_row_norm import row_norm
from peftkern.testing.bases import random_base

from ..triton import ARCHS, Report, captured, fits, report, share, tensors, values

BOUNDS = "triton_quantised"


@dataclass(frozen=True)
class Case:
    """Both passes and the row norm. ``base``: a name of ``peftkern.testing.bases``. M decides between the kernels."""

    arch: int
    base: str = "nf4 nested"
    M: int = 64
    K: int = 4096
    N: int = 4096
    R: int = 16
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"sm_{self.arch}-{self.base.replace(' ', '-')}-{self.M}x{self.K}x{self.N}"


def weight(name: str, N: int, K: int):
    """A base of that name as kernels take it, without memory."""
    with FakeTensorMode():
        base = random_base(name, N, K, torch.Generator())
    parts = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in base.tensors]
    return weight_of(base.kind, parts, N, K)


def standard_cases(arch: int) -> list[Case]:
    """4 and 8 bits; the few rows of decoding, more of them, panels."""
    return [Case(arch, base, M) for base in ("nf4 nested", "int8") for M in (16, 64, 4096)]


def more_cases(arch: int) -> list[Case]:
    """Further ways to hold codes and scales; rows that share bytes; fp32 activations."""
    ways = ("fp4", "int4 bf16", "hqq4", "fp8 by blocks", "mxfp4", "q4_0", "q8_0")
    return [
        *(Case(arch, base, M) for base in ways for M in (16, 64, 4096)),
        Case(arch, M=16, K=4095),
        Case(arch, M=4096, K=4095),
        Case(arch, dtype=torch.float32),
        Case(arch, M=4096, dtype=torch.float32),
    ]


STANDARD = [case for arch in ARCHS for case in standard_cases(arch)]
MORE = (*(case for arch in ARCHS for case in more_cases(arch)), *standard_cases(120))


def capture(case: Case) -> list[launch.Launch]:
    """The launches of both passes and of the row norm that read codes, none of which runs."""

    def empty(*shape, dtype=case.dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    M, K, N, R = case.M, case.K, case.N, case.R
    x, dy, w = empty(M, K), empty(M, N), weight(case.base, N, K)
    A, B, u = (empty(*shape, dtype=torch.float32) for shape in ((R, K), (N, R), (M, R)))
    settings, drop = Settings(case.arch), Dropout(0.1, empty(1, dtype=torch.int64))
    with captured() as taken:
        forward(Forward(x, w, A, B, empty(N), 2.0, drop), settings)
        backward(Backward(dy, x, u, None, w, A, B, 2.0, drop, needs=Needs(True, True, True)), settings)
        row_norm(w, A, B, 2.0, settings)
    return [item for item in taken if "w.codes" in tensors(item)]


@functools.cache
def reports(case: Case) -> tuple[Report, ...]:
    """One per launch of the case, in order."""
    return tuple(report(item, case.arch) for item in capture(case))


def code_bytes(r: Report) -> float:
    """The bytes of a tile of codes that each thread has."""
    shares = {"expand_kernel": "BLOCK_N BLOCK_K", "panel_kernel": "BLOCK_N BLOCK_K", "row_norm_kernel": "BLOCK_N BLOCK_K"}
    given = values(r.item)
    return share(r, shares[r.item.name], 1) * given["w.HALF"].value / given["w.RUN"].value


def widths(r: Report) -> list[str]:
    """Codes move 16 bytes at a time, or a thread's share, wherever their rows begin at such places; all else as dense."""
    w, found = values(r.item), []
    packed = w["w.RUN_BYTES"].value == w["w.HALF"].value and (w["w.WHOLE"].value or w["w.row"] % 16 == 0)
    for access in r.accesses:
        if access.tensor == "w.codes":
            mine = min(16, code_bytes(r)) if packed else 1
        elif access.tensor.startswith("w."):
            continue  # a few numbers of a tile
        else:
            mine = 0
        if access.bytes < mine:
            found.append(f"{access}, a thread's share is {mine:g} bytes")
    return found


CHECKS = (fits, widths)

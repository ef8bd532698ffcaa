"""Every Triton launch of bottleneck_adapter, and what must hold of its code: as lora_linear.py, whose tables know its kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from peftkern.kernels import launch
from peftkern.kernels.bottleneck.bottleneck_adapter import Backward, Forward, Needs, backward, forward
from peftkern.kernels.call import Dropout, Settings

from ..triton import ARCHS, NAMES, Report, captured, fits
from .lora_linear import widths as _widths

BOUNDS = "triton_bottleneck_adapter"


@dataclass(frozen=True)
class Case:
    """One training step: with the options of a Houlsby adapter, or all (``everything``), with dropout on ``drop``."""

    arch: int
    M: int = 8192
    K: int = 4096
    R: int = 64
    adapter_dtype: torch.dtype = torch.float32
    activation: str = "relu"
    drop: str = ""
    everything: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        types = f"{NAMES[self.dtype]}-{NAMES[self.adapter_dtype]}"
        options = f"{'-drop' * bool(self.drop)}{self.drop}{'-all' * self.everything}"
        return f"sm_{self.arch}-{self.M}x{self.K}-r{self.R}-{types}-{self.activation}{options}"


def standard_cases(arch: int) -> list[Case]:
    """Adapters in both dtypes, the second with every option; few rows; a rank that does not fit."""
    return [
        Case(arch),
        Case(arch, adapter_dtype=torch.bfloat16, activation="gelu", drop="out", everything=True),
        Case(arch, M=64, activation="gelu"),
        Case(arch, R=512, adapter_dtype=torch.bfloat16),
    ]


def more_cases(arch: int) -> list[Case]:
    """The smallest tile; the largest, with every option and fp32 adapters; fp32 activations."""
    return [
        Case(arch, R=16, drop="in", activation="gelu_tanh"),
        Case(arch, R=128, drop="in", everything=True, activation="silu"),
        Case(arch, R=32, dtype=torch.float32),
    ]


STANDARD = [case for arch in ARCHS for case in standard_cases(arch)]
MORE = (*(case for arch in ARCHS for case in more_cases(arch)), *standard_cases(120)[:2])


def capture(case: Case) -> list[launch.Launch]:
    """The launches of both passes, none of which runs."""

    def empty(*shape, dtype=case.dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def vector(size, wanted=case.everything):
        return empty(size, dtype=torch.float32) if wanted else None

    M, K, R, full = case.M, case.K, case.R, case.everything
    h, dy, t = empty(M, K), empty(M, K), empty(M, R, dtype=torch.float32)
    down, up = empty(R, K, dtype=case.adapter_dtype), empty(K, R, dtype=case.adapter_dtype)
    drop = Dropout(0.1, empty(1, dtype=torch.int64))
    first, last = (drop if case.drop == where else Dropout() for where in ("in", "out"))
    beside = vector(K, True), vector(M), vector(K), case.activation, 2.0, first, last
    with captured() as taken:
        forward(Forward(h, dy if full else None, down, up, vector(R, True), *beside), Settings(case.arch))
        needs = Needs(True, True, True, True, True, full, full)
        backward(Backward(dy, h, t, down, up, *beside, not full, needs), Settings(case.arch))
    return taken


def widths(r: Report) -> list[str]:
    """As lora_linear's; the product with a single row (of ``up_bias``, for the gate's gradient) has one number to store."""
    return [] if r.item.args.get("R") == 1 else _widths(r)


def instructions(r: Report) -> list[str]:
    """Products in half precision are on the tensor cores, in the form of the architecture; operands are copied ahead."""
    products = ("bottleneck_kernel", "bottleneck_out_kernel", "shrink_kernel", "adapter_grad_kernel")
    if r.item.name not in products or torch.float32 in (
        r.item.args[k].dtype for k in ("out", "x", "t") if k in r.item.args
    ):
        return []
    matrix = {90: r"wgmma\.mma_async", 100: r"tcgen05\.mma\.cta_group"}
    expected = [matrix.get(r.arch, r"mma\.sync\.aligned\.m16n8k16\.\S*f32\.bf16\.bf16")]
    expected += [r"\bcp\.async\.c[ag]\.shared"] * (r.item.name != "bottleneck_out_kernel")
    return [f"no {what}" for what in expected if not re.search(what, r.ptx)]


CHECKS = (fits, widths, instructions)

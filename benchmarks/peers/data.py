"""Tensors of a block of cases with one adapter, which its providers share, and the frozen linears that all have beside
them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.case import BASE, FP32_BASE, Case, Provider, Step
from ..measure.device_timing import rotation

SCALING = 2.0


@dataclass
class Data:
    """Tensors that the providers of a block share, one of each per copy; adapters are made once per (R, dtype)."""

    case: Case
    x: list[Tensor]
    weight: list[Tensor]
    dy: list[Tensor]
    made: dict = field(default_factory=dict)

    def adapters(self, R: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """lora_A (R, K) and lora_B (N, R), both trainable and both random: a zero B would hide work and errors."""
        if (R, dtype) not in self.made:
            generator = torch.Generator(self.case.device).manual_seed(R)
            make = functools.partial(torch.randn, generator=generator, device=self.case.device)
            A = make(R, self.case.K).mul_(self.case.K**-0.5).to(dtype).requires_grad_()
            B = make(self.case.N, R).mul_(R**-0.5).to(dtype).requires_grad_()
            self.made[R, dtype] = A, B
        return self.made[R, dtype]

    def as_fp32(self) -> Data:
        """The same data in fp32 (itself if it already is)."""
        if self.case.dtype == torch.float32:
            return self
        if "fp32" not in self.made:
            convert = [[t.detach().float() for t in part] for part in (self.x, self.weight, self.dy)]
            self.made["fp32"] = Data(self.case, [x.requires_grad_() for x in convert[0]], *convert[1:])
        return self.made["fp32"]


def make_data(case: Case, copies: int) -> Data:
    """x (M, K) that requires grad, weight (N, K), dy (M, N), ``copies`` of each."""
    generator = torch.Generator(case.device).manual_seed(0)

    def make(rows: int, cols: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, cols, generator=generator, device=case.device).mul_(scale).to(case.dtype)

    return Data(
        case,
        [make(case.M, case.K).requires_grad_() for _ in range(copies)],
        [make(case.N, case.K, case.K**-0.5) for _ in range(copies)],
        [make(case.M, case.N) for _ in range(copies)],
    )


def copies(case: Case, cache_bytes: int) -> int:
    """With few rows the time is that of reading W, and in a real model each layer's W comes from memory, not from a
    cache: take turns over enough copies to exceed the last cache twice (eight at most). With many rows, or a W that
    is small itself, one copy. On a GPU, where a layer takes less time than its cache takes to turn over, always."""
    if case.device == "cuda":
        return rotation((case.M * (case.K + case.N) + case.K * case.N) * case.dtype.itemsize, cache_bytes)
    weight = case.K * case.N * case.dtype.itemsize
    return 1 if case.M > 64 or weight < 1 << 20 else max(1, min(8, -(-2 * cache_bytes // weight)))


def frozen_linear(weight: Tensor) -> nn.Linear:
    """The nn.Linear that a block is compared with; the weight itself is in it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _base(case: Case, data: Data) -> Step:
    layers = [frozen_linear(w) for w in data.weight]
    return Step(lambda i: layers[i](data.x[i]), [[x] for x in data.x], data.dy, data.weight)


# What every op with one adapter is compared with.
BASES = (
    Provider(BASE, "frozen linear", _base),
    Provider(FP32_BASE, "frozen linear, fp32", lambda case, data: _base(case, data.as_fp32())),
)

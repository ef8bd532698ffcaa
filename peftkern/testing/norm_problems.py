"""Random lora_row_norm problems: ragged sizes, any layout, and weights that the branch nearly cancels."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..autograd.row_norm import row_norm
from .bases import QUANTISED, dequantised, drawn
from .problems import laid_out

LAYOUTS = ("contiguous", "row_stride", "transposed")


@dataclass(frozen=True)
class RowNormProblem:
    """Sizes and dtypes of one call; ``seed`` makes its values. ``cancel``: W is -s B A, rounded: what is left is rounding.

    ``layout`` and ``adapter_layout``: of W, of A and B. ``base``: dense, or one of QUANTISED (peftkern/testing/bases.py).
    """

    seed: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    scaling: float = 1.0
    layout: str = "contiguous"
    adapter_layout: str = "contiguous"
    zero_weight: bool = False
    b_scale: float = 1.0
    cancel: bool = False
    base: str = "dense"

    # The norm is a constant of the graph.
    frozen = frozenset({"lora_A", "lora_B"})

    def __str__(self) -> str:
        return " ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in asdict(self).items())

    def tensors(self) -> dict[str, Tensor]:
        """weight, lora_A and lora_B on CPU."""
        gen = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, scale: float, dtype: torch.dtype) -> Tensor:
            return (torch.randn(*shape, generator=gen) * scale).to(dtype)

        N, K, R = self.N, self.K, self.R
        size = 1 / math.sqrt(max(K, 1))
        A = normal(R, K, scale=size, dtype=self.adapter_dtype)
        B = normal(N, R, scale=self.b_scale / math.sqrt(max(R, 1)), dtype=self.adapter_dtype)
        W = normal(N, K, scale=0.0 if self.zero_weight else size, dtype=self.dtype)
        if self.cancel:
            W = (-self.scaling * (B.double() @ A.double())).to(self.dtype)
        quantised = self.base in QUANTISED
        return {
            "weight": dequantised(drawn(self.base, N, K, self.seed), N, K) if quantised else laid_out(W, self.layout),
            "lora_A": laid_out(A, self.adapter_layout),
            "lora_B": laid_out(B, self.adapter_layout),
        }

    def ours(self, t: dict[str, Tensor]) -> Tensor:
        """The norms from peftkern."""
        quantised = self.base in QUANTISED
        weight = drawn(self.base, self.N, self.K, self.seed, t["lora_A"].device) if quantised else t["weight"]
        return row_norm(weight, t["lora_A"], t["lora_B"], self.scaling)

    def eager(self, t: dict[str, Tensor]) -> Tensor:
        """The whole sum, then its norm, as PEFT's DoRA makes it; in fp32, which the result has."""
        W, A, B = (t[name].float() for name in ("weight", "lora_A", "lora_B"))
        return torch.linalg.norm(W + self.scaling * (B @ A), dim=1)

    def oracle(self, t: dict[str, Tensor], absolute: bool = False) -> Tensor:
        """The norms as the equation says, in the dtype of ``t``."""
        scaling = abs(self.scaling) if absolute else self.scaling
        total = torch.addmm(t["weight"], t["lora_B"], t["lora_A"], alpha=scaling)
        return total.square().sum(1).sqrt()


def random_norm_problem(
    seed: int, dtype: torch.dtype, *, cancel: bool = False, max_KN: int = 5000, max_R: int = 300
) -> RowNormProblem:
    """The problem number ``seed``. ``cancel``: as of ``RowNormProblem``."""
    rng = random.Random(seed)

    def size(high: int) -> int:
        return min(high, round(math.exp(rng.uniform(0.0, math.log(high + 1)))))

    adapter_dtype = rng.choice((torch.float32, dtype))
    return RowNormProblem(
        seed=seed, N=size(max_KN), K=size(max_KN), R=0 if rng.random() < 0.05 else size(max_R), dtype=dtype,
        adapter_dtype=adapter_dtype,
        scaling=rng.choice((1.0, 2.0, 0.37, -1.5, 0.0)),
        layout=rng.choice(LAYOUTS),
        adapter_layout=rng.choice(LAYOUTS),
        zero_weight=rng.random() < 0.15,
        b_scale=rng.choice((1.0, 1.0, 1e-3, 1e-6, 0.0)) if adapter_dtype == torch.float32 else 1.0,
        cancel=cancel,
    )  # fmt: skip

"""Random lora_linear problems: sizes drawn log-uniformly, any subset of optional arguments, odd layouts.

A problem is a small frozen record that prints itself and makes the same tensors whenever it is asked, so that a
failure can be repeated from one line.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from .. import equation
from ..autograd.lora_linear import Options, lora_linear_with
from ..bases.base import IDENTITY
from ..ops.dropout_mask import dropout_mask_ref
from . import equations
from .bases import QUANTISED, dequantised, drawn

DROPOUT_SEED = 0x5EED_0F_D20B_0075
LAYOUTS = ("contiguous", "row_stride", "transposed", "nd")
LARGE = 2**31


def vectors() -> dict[str, str]:
    """Name and axis (R, K or N) of every vector that a call may have."""
    return {"bias": "N"} | {c.name: equation.place(c.symbol).axis for c in equation.COEFFICIENTS}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (M, K) in one of LAYOUTS."""
    M, K = x.shape
    if layout == "row_stride":
        return torch.cat([x, torch.full((M, 3), math.nan, dtype=x.dtype)], dim=1)[:, :K]
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "nd":
        first = next((d for d in (7, 5, 3, 2) if M % d == 0), 1) if M else 2
        return x.reshape(first, M // first, K)
    return x


@dataclass(frozen=True)
class LoRALinearProblem:
    """Sizes, dtypes and options of one call; ``seed`` makes its values. ``frozen``: what does not require grad.

    ``base``: dense, identity, or one of QUANTISED (peftkern/testing/bases.py), for a K that its kind has.
    """

    seed: int
    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    scaling: float = 1.0
    dropout_p: float = 0.0
    options: tuple[str, ...] = ()
    vector_dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    zero_weight: bool = False
    b_scale: float = 1.0
    base: str = "dense"
    frozen: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        parts = asdict(self)
        parts["frozen"] = ",".join(sorted(self.frozen)) or "-"
        parts["options"] = ",".join(self.options) or "-"
        return " ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in parts.items())

    def tensors(self) -> dict[str, torch.Tensor]:
        """x, weight, lora_A, lora_B, dy and the optional vectors, on CPU, without grad."""
        gen = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return (torch.randn(*shape, generator=gen) * scale).to(dtype)

        M, K, N, R = self.M, self.K, self.N, self.R
        out = {
            "x": laid_out(normal(M, K), self.layout),
            "weight": normal(N, K, scale=0.0 if self.zero_weight else 1 / math.sqrt(max(K, 1))),
            "lora_A": normal(R, K, scale=1 / math.sqrt(max(K, 1)), dtype=self.adapter_dtype),
            "lora_B": normal(N, R, scale=self.b_scale / math.sqrt(max(R, 1)), dtype=self.adapter_dtype),
        }
        if self.base == "identity":
            del out["weight"]
        elif self.base in QUANTISED:
            out["weight"] = dequantised(drawn(self.base, N, K, self.seed), N, K)
        out["dy"] = normal(*out["x"].shape[:-1], N)
        sizes, axes = {"R": R, "K": K, "N": N}, vectors()
        for name in self.options:
            out[name] = normal(sizes[axes[name]], dtype=self.vector_dtype)
        return out

    def ours(self, t: dict[str, Tensor]) -> Tensor:
        """y from peftkern."""
        t = dict(t)
        x, lora_A, lora_B, bias = (t.pop(k, None) for k in ("x", "lora_A", "lora_B", "bias"))
        options, weight = Options(self.scaling, self.dropout_p, DROPOUT_SEED), t.pop("weight", IDENTITY)
        if self.base in QUANTISED:
            weight = drawn(self.base, self.N, self.K, self.seed, x.device)
        return lora_linear_with(x, weight, lora_A, lora_B, bias, options, t or None)

    def eager(self, t: dict[str, Tensor]) -> Tensor:
        """y in PEFT's order of operations; a quantised weight is first dequantised to the activation's dtype."""
        t = t | ({"weight": t["weight"].to(self.dtype)} if self.base in QUANTISED else {})
        return equations.eager(t, self.scaling, self._keep(t["x"].device), self.dropout_p)

    def oracle(self, t: dict[str, Tensor], absolute: bool = False) -> Tensor:
        """y as the equation says, in the dtype of ``t``."""
        scaling = abs(self.scaling) if absolute else self.scaling
        return equations.oracle(t, scaling, self._keep(t["x"].device), self.dropout_p)

    def _keep(self, device: torch.device) -> Tensor | None:
        if not self.dropout_p:
            return None
        return dropout_mask_ref(torch.tensor([DROPOUT_SEED], device=device), self.M, self.K, self.dropout_p)


def random_problem(
    seed: int, dtype: torch.dtype, adapter_dtype: torch.dtype | None = None, *,
    large: bool = False, max_M: int = 4096, max_KN: int = 5000, max_R: int = 300,
) -> LoRALinearProblem:  # fmt: skip
    """The problem number ``seed``. ``large``: M K N above 2^31. ``adapter_dtype=None`` draws fp32 or ``dtype``."""
    rng = random.Random(seed)

    def size(low: int, high: int) -> int:
        return min(high, round(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))

    M = 0 if rng.random() < 0.03 else size(1, max_M)
    K, N, R = size(1, max_KN), size(1, max_KN), size(1, max_R)
    while large and M * K * N <= LARGE:
        M, K, N = (
            rng.randint(max_M // 4, max_M),
            rng.randint(max_KN // 4, max_KN),
            rng.randint(max_KN // 4, max_KN),
        )
    adapter_dtype = adapter_dtype or rng.choice((torch.float32, dtype))
    options = tuple(name for name in vectors() if rng.random() < 0.5)
    trainable = ("x", "lora_A", "lora_B", *options)
    return LoRALinearProblem(
        seed=seed, M=M, K=K, N=N, R=R, dtype=dtype, adapter_dtype=adapter_dtype,
        scaling=rng.choice((1.0, 2.0, 0.37, -1.5, 0.0)),
        dropout_p=rng.choice((0.0, 0.0, 0.1, 0.5, 0.9)),
        options=options,
        vector_dtype=rng.choice((torch.float32, dtype)),
        layout=rng.choice(LAYOUTS),
        zero_weight=rng.random() < 0.15,
        b_scale=rng.choice((1.0, 1.0, 1e-3, 1e-6)) if adapter_dtype == torch.float32 else 1.0,
        frozen=frozenset(n for n in trainable if rng.random() < 0.15),
    )  # fmt: skip


def random_problems(count: int, dtype: torch.dtype, *, first_seed: int = 0, large_every: int = 12, **limits):
    """``count`` problems, every ``large_every``-th of them with M K N above 2^31 (0: none)."""
    for i in range(count):
        large = large_every > 0 and i % large_every == large_every - 1
        yield random_problem(first_seed + i, dtype, large=large, **limits)

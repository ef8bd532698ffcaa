"""Random block_rotate problems: any size of a block, one matrix for all, columns in any order, any layout."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..autograd.block_rotate import block_rotate
from .problems import laid_out

LAYOUTS = ("contiguous", "row_stride", "transposed")


@dataclass(frozen=True)
class BlockRotateProblem:
    """M rows of ``blocks`` blocks of ``size`` columns; ``seed`` makes the values, and the order of the columns if they are
    ``permuted``. ``adapter_dtype``: of the matrices. ``shared``: one for all blocks. ``layout``: of x."""

    seed: int
    M: int
    blocks: int
    size: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    shared: bool = False
    permuted: bool = False
    layout: str = "contiguous"

    frozen = frozenset()

    def __str__(self) -> str:
        return " ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in asdict(self).items())

    @property
    def K(self) -> int:
        """Columns."""
        return self.blocks * self.size

    def index(self, device: torch.device) -> Tensor | None:
        """The order of the columns."""
        gen = torch.Generator().manual_seed(self.seed)
        return torch.randperm(self.K, generator=gen).to(device) if self.permuted else None

    def tensors(self) -> dict[str, Tensor]:
        """x, R and dy on CPU."""
        gen = torch.Generator().manual_seed(self.seed)
        shape = (1 if self.shared else self.blocks, self.size, self.size)
        x, dy = (torch.randn(self.M, self.K, generator=gen).to(self.dtype) for _ in range(2))
        R = torch.randn(shape, generator=gen) / math.sqrt(self.size)
        return {"x": laid_out(x, self.layout), "R": R.to(self.adapter_dtype), "dy": dy}

    def ours(self, t: dict[str, Tensor]) -> Tensor:
        """y from peftkern."""
        return block_rotate(t["x"], t["R"], self.index(t["x"].device))

    def eager(self, t: dict[str, Tensor]) -> Tensor:
        """As PEFT's OFT multiplies: in the dtype of R, then rounded to that of x."""
        x, R, index = t["x"], t["R"], self.index(t["x"].device)
        of = x.to(R.dtype) if index is None else x.to(R.dtype)[:, index]
        blocks = of.view(self.M, self.blocks, self.size) if of.is_contiguous() else of.unflatten(1, (-1, self.size))
        y = torch.einsum("mgi,gij->mgj", blocks, R.expand(self.blocks, -1, -1)).flatten(1)
        return (y if index is None else y[:, index.argsort()]).to(x.dtype)

    def oracle(self, t: dict[str, Tensor], absolute: bool = False) -> Tensor:
        """x times the whole matrix, in the dtype of ``t``."""
        x, R, index = t["x"], t["R"], self.index(t["x"].device)
        whole = torch.block_diag(*R.expand(self.blocks, -1, -1))
        order = torch.arange(self.K, device=x.device) if index is None else index.argsort()
        return x @ whole[order][:, order]


def random_rotate_problem(
    seed: int, dtype: torch.dtype, *, max_M: int = 600, max_KN: int = 1500, max_R: int = 200
) -> BlockRotateProblem:
    """The problem number ``seed``; ``max_R``: of the columns of a block."""
    rng = random.Random(seed)

    def size(high: int) -> int:
        return max(1, min(high, round(math.exp(rng.uniform(0.0, math.log(high + 1))))))

    block = rng.choice((2, 4, 8, 16, 32)) if rng.random() < 0.4 else size(min(max_R, max_KN))
    return BlockRotateProblem(
        seed=seed, M=size(max_M), blocks=size(max(max_KN // block, 1)), size=block, dtype=dtype,
        adapter_dtype=rng.choice((torch.float32, dtype)), shared=rng.random() < 0.3, permuted=rng.random() < 0.4,
        layout=rng.choice(LAYOUTS),
    )  # fmt: skip

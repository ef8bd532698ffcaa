"""Two launches for the branch of many adapters over weights padded to one rank: a peer, stated from its description.

punica and, in Triton, vLLM keep all adapters in one stack, padded to the largest rank that is allowed, sort the rows of a
batch by adapter without moving them (an index list), and launch a shrink (v = x A^T, split along K) and an expand
(y += s v B^T) over tiles of rows of one adapter. vLLM adds the parts of the split with atomics into a buffer that a third
launch has set to zero; here each part is stored and the expand adds them, which spares that launch. As there, adapters
are held in the activation's dtype. The kernels (padded_kernels.py) are Triton; there is no form for a CPU beside
Triton's interpreter. For serving only: the original has no backward pass.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..core.case import Case
from .candidates import NOT_HERE
from .many_data import MultiData, Stack
from .split import interpreted

TILE_ROWS, BLOCK_K = 16, 256
# Programs that a launch should have at least, and the most parts of a sum over K.
PROGRAMS, MOST_SPLITS = 256, 16


def unusable(case: Case) -> str | None:
    """Why the kernels cannot run a case here, or None."""
    if importlib.util.find_spec("triton") is None:
        return f"{NOT_HERE}the package triton is not installed"
    if case.device == "cpu" and not interpreted():
        return f"{NOT_HERE}Triton kernels do not run on CPU tensors"
    return None


def tiles(ids: Tensor, rows: int = TILE_ROWS) -> tuple[Tensor, Tensor]:
    """(order, tiles) on the device of ``ids``: rows that have an adapter, sorted by it, and for each tile its adapter and
    the first and the end position in ``order``, int32 (tiles, 3)."""
    order = ids.long().sort(stable=True).indices[int((ids < 0).sum()) :]
    found, position = [], 0
    for adapter, count in zip(*(t.tolist() for t in ids[order].unique_consecutive(return_counts=True))):
        end = position + count
        found += [(adapter, first, min(first + rows, end)) for first in range(position, end, rows)]
        position = end
    return order.to(torch.int32), torch.tensor(found, dtype=torch.int32, device=ids.device).reshape(-1, 3)


def splits(tile_count: int, K: int) -> int:
    """Parts of the sum over K."""
    return max(1, min(MOST_SPLITS, -(-PROGRAMS // max(tile_count, 1)), -(-K // BLOCK_K)))


class Padded:
    """The peer, with the interface of those in many.py."""

    trains = False

    def __init__(self, data: MultiData, dtype: torch.dtype, dropout: float):
        own = data.case.dtype
        self.stacks = [Stack(s.A.detach().to(own), s.B.detach().to(own)) for s in data.stacks(dtype)]
        self.order, self.tiles = tiles(data.ids)
        self.scaling = torch.tensor(data.scalings, dtype=torch.float32, device=data.ids.device)

    def leaves(self, i: int) -> list[Tensor]:
        """The two stacks."""
        return [self.stacks[i].A, self.stacks[i].B]

    used = leaves

    def add(self, y: Tensor, x: Tensor, i: int) -> Tensor:
        """y (M, N) += the branch of x (M, K)."""
        from . import padded_kernels

        stack = self.stacks[i]
        if self.order.numel():
            parts = splits(len(self.tiles), x.shape[1])
            v = padded_kernels.shrink(x, stack.A, self.order, self.tiles, TILE_ROWS, BLOCK_K, parts)
            padded_kernels.expand(y, v, stack.B, self.order, self.tiles, self.scaling, TILE_ROWS)
        return y

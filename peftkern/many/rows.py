"""The rows of a bank: the table and the scalings that its states share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks import accumulate_dtype
from ..ops.adapter_table import COLUMNS, FREE


class Rows:
    """``table`` (slots, columns) and ``scaling`` (slots), free at first. Not thread-safe: the owner holds a lock."""

    def __init__(self, slots: int, dtype: torch.dtype, device: torch.device):
        with torch.inference_mode(False):
            self.table = torch.zeros((slots, len(COLUMNS)), dtype=torch.int64, device=device)
            self.table[:, 0] = FREE
            self.scaling = torch.zeros(slots, dtype=accumulate_dtype(dtype), device=device)

    def leave(self) -> None:
        """Write to copies from now on: whoever reads the tensors of before keeps them as they are."""
        self.table, self.scaling = self.table.clone(), self.scaling.clone()

    def write(self, slot: int, row: Sequence[int], scaling: float) -> None:
        """Change one row, in place."""
        self.table[slot] = torch.tensor(row, dtype=torch.int64)
        self.scaling[slot] = scaling

"""identity: the residual stream. There is no weight; N equals K."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Identity:
    """Base(x) = x."""

    name = "identity"
    sized = False

    def check(self, tensors: Sequence[Tensor], like: Tensor, K: int | None, N: int | None) -> tuple[int, int]:
        """(K, K)."""
        if tensors:
            raise ValueError(f"base has {len(tensors)} tensors, expected none for the identity")
        size = K if K is not None else N
        if None not in (K, N) and K != N:
            raise ValueError(f"the identity has as many out_features as in_features, got N = {N} and K = {K}")
        return size, size

    def cast(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Nothing to cast."""
        return []

    def dequantise(self, tensors: Sequence[Tensor], dtype: torch.dtype, shape: tuple[int, int]) -> None:
        """There is no weight."""
        return None

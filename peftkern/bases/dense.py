"""dense: one weight W (N, K) in the activation's dtype, any strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_fits, check_tensor


class Dense:
    """Base(x) = x W^T."""

    name = "dense"
    sized = True

    def check(self, tensors: Sequence[Tensor], like: Tensor, K: int | None, N: int | None) -> tuple[int, int]:
        """(N, K) of the weight."""
        if len(tensors) != 1:
            raise ValueError(f"base has {len(tensors)} tensors, expected the weight alone")
        weight = tensors[0]
        check_tensor("weight", weight)
        if weight.dim() != 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K)")
        shape = (weight.shape[0] if N is None else N, weight.shape[1] if K is None else K)
        check_fits("weight", weight, shape, "(N, K)", like.device, (like.dtype,))
        return shape

    def cast(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The weight in ``dtype``."""
        return [t if t.dtype == dtype else t.to(dtype) for t in tensors]

    def dequantise(self, tensors: Sequence[Tensor], dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
        """W itself."""
        return tensors[0].to(dtype)

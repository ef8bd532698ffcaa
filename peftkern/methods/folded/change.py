"""What methods that change the weight have in common: their matrices are made in fp32, whatever autocast says."""

from __future__ import annotations

from torch import Tensor

from ...autograd.folded_linear import folded_linear
from ...autograd.shapes import cast, exactly
from ...checks import accumulate_dtype
from ..look import NotCovered


def wide(t: Tensor) -> Tensor:
    """A tensor in fp32 (fp64 for fp64)."""
    return cast(t, accumulate_dtype(t.dtype))


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32 (fp64), under autocast too."""
    with exactly(left):
        return wide(left) @ wide(right)


def rows_times(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (R, K) times the transpose of a frozen weight (N, K), in fp32 (fp64), under autocast too."""
    with exactly(rows):
        return folded_linear(wide(rows), weight)


def refuse_half(name: str, *tensors: Tensor) -> None:
    """Decline an adapter in half precision: a folded weight is in fp32, whose product may cost more than the library's two."""
    if any(t.dtype.itemsize < 4 for t in tensors):
        raise NotCovered(f"adapter {name!r} is in half precision, and its weight would be folded in fp32")

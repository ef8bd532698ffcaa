"""The base product alone, by whoever is fastest, for functions that compute their gradients by it.

    y = x W^T + bias
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch.registry import caller
from ..equation import NO_SCALES
from .shapes import rows_of

_fwd = caller("lora_linear_fwd")


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (..., N) of x (..., K) and the weight (N, K), both of one dtype, which y gets too: a layer without a branch."""
    (N, K), rows = weight.shape, rows_of(x, x.dtype)
    none = weight.new_empty((0, K)), weight.new_empty((N, 0))
    y, _, _ = _fwd(rows, [weight], "dense", *none, bias, 1.0, 0.0, None, list(NO_SCALES), False)
    return y.view(*x.shape[:-1], N)

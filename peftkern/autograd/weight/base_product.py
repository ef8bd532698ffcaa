"""The base product alone, by whoever is fastest, for functions that compute their gradients by it.

y = x W^T + bias
"""

from __future__ import annotations

from torch import Tensor

from ...dispatch.watch import nobody_watches
from ...settings import current
from ..lora_linear import Call


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (..., N) of x (..., K) and the weight (N, K), both of one dtype, which y gets too: a layer without a branch."""
    (N, K), now = weight.shape, current() if nobody_watches() else None
    call = Call(now, "dense", 1.0, 0.0, None, False)
    return call.forward(x, weight.new_empty((0, K)), weight.new_empty((N, 0)), bias, (weight,), False, False)

"""SSF (Lian et al. 2022) on a linear layer: what it puts out is scaled and shifted.

y = scale * (x W^T + bias) + shift        scale, shift (N)
"""

from __future__ import annotations

from torch import Tensor

from ...bases.base import Base
from ..linear import Linear, frozen_weight, run
from ..registry import Held, Method, register
from .ia3 import with_ia3


def ssf_linear(x: Tensor, weight: Tensor | Base, scale: Tensor, shift: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """A frozen linear layer with SSF: the equation at the top of peftkern/methods/scale/ssf.py.

    Args:
        x: (..., K). weight: (N, K). scale, shift: (N), in fp32 or x's dtype. bias: (N).

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    weight = frozen_weight(weight, bias, scale=(scale, "N"), shift=(shift, "N"))
    return run(apply(Linear(weight, bias), Held("", SSF, (scale, shift))), x)


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this scale and shift."""
    scale, shift = adapter.tensors
    return with_ia3(y, scale, is_feedforward=False).add_bias(shift)


SSF = register(
    Method(
        name="SSF",
        taxonomy="additive",
        family="L",
        layer=None,
        apply=apply,
        function=ssf_linear,
        op="lora_linear",
        coefficients=("g_b",),
        saves="x W^T (M, N)",
        merges="scale * W, and scale * bias + shift",
    )
)

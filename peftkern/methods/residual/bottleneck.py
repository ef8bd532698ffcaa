"""Bottlenecks: two small products around an activation (Houlsby et al. 2019), and methods that make or join them.

y = residual + g * drop(s c * (f(h D^T + b_down) U^T + b_up))
"""

from __future__ import annotations

from ...autograd.residual.bottleneck_adapter import bottleneck_adapter
from .stream import StreamMethod, register

HUB = {"adapters": ((1, 3), (1, 3))}
NONLINEAR = "not at all: an activation stands between its matrices"
_OPTIONS = frozenset({"gelu", "down_bias", "up_bias"})
_GRADIENTS = frozenset({"through", *(f"need_{name}" for name in ("h", "down", "up", "down_bias", "up_bias"))})

BOTTLENECK = register(
    StreamMethod(
        name="bottleneck adapter", taxonomy="additive", family="B", op="bottleneck_adapter", function=bottleneck_adapter,
        saves="h, and (M, R) in fp32", merges=NONLINEAR, tested=HUB, options=_OPTIONS, gradients=_GRADIENTS, many=True,
    )
)  # fmt: skip
COMPACTER = register(
    StreamMethod(
        name="Compacter", taxonomy="reparameterised", family="B", op="bottleneck_adapter",
        saves="h, (M, R) in fp32, and both matrices", merges=NONLINEAR, tested=HUB,
        options=_OPTIONS, gradients=_GRADIENTS, many=True,
    )
)  # fmt: skip
INVERTIBLE = register(
    StreamMethod(
        name="invertible", taxonomy="additive", family="B", op="bottleneck_adapter",
        saves="the halves of h, and (M, 2 R) in fp32", merges=NONLINEAR, tested=HUB,
        options=_OPTIONS | {"residual"}, gradients=_GRADIENTS - {"through"},
    )
)  # fmt: skip
FUSION = register(
    StreamMethod(
        name="AdapterFusion", taxonomy="additive", family="B", op="adapter_fusion",
        saves="h, what the adapters put out, and their scores", merges="not at all: each token has its own", tested=HUB,
    )
)  # fmt: skip

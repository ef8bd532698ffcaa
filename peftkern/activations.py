"""The activations of a bottleneck: their names, in the order of the codes that native kernels know, values and slopes.

Each is an elementwise function z = f(t) whose slope f'(t) follows from t alone, so backward keeps t and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Of leaky_relu, below zero: torch's default.
LEAK = 0.01
# Of the tanh form of gelu.
GELU_SCALE, GELU_CUBE = math.sqrt(2.0 / math.pi), 0.044715


class Activation(NamedTuple):
    """``value``: f(t). ``slope``: f'(t), by the same formula in every back end."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _gelu_slope(t: Tensor) -> Tensor:
    density = torch.exp(-0.5 * t * t) * (1.0 / math.sqrt(2.0 * math.pi))
    return 0.5 * (1.0 + torch.erf(t * math.sqrt(0.5))) + t * density


def _gelu_tanh_slope(t: Tensor) -> Tensor:
    h = torch.tanh(GELU_SCALE * (t + GELU_CUBE * t**3))
    return 0.5 * (1.0 + h) + 0.5 * t * (1.0 - h * h) * GELU_SCALE * (1.0 + 3.0 * GELU_CUBE * t * t)


def _silu_slope(t: Tensor) -> Tensor:
    s = torch.sigmoid(t)
    return s * (1.0 + t * (1.0 - s))


def _sigmoid_slope(t: Tensor) -> Tensor:
    s = torch.sigmoid(t)
    return s * (1.0 - s)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda t: t, torch.ones_like),
    "relu": Activation(F.relu, lambda t: (t > 0).to(t.dtype)),
    "leaky_relu": Activation(F.leaky_relu, lambda t: torch.where(t > 0, t.new_ones(()), LEAK)),
    "gelu": Activation(F.gelu, _gelu_slope),
    "gelu_tanh": Activation(lambda t: F.gelu(t, approximate="tanh"), _gelu_tanh_slope),
    "silu": Activation(F.silu, _silu_slope),
    "tanh": Activation(torch.tanh, lambda t: 1.0 - torch.tanh(t).square()),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_slope),
}
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
# What transformers and others call the same functions.
_ALIASES = {
    "linear": "identity", "leakyrelu": "leaky_relu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
}  # fmt: skip


def activation_name(name: str) -> str:
    """The name in ``ACTIVATIONS`` of an activation. Raises TypeError for no string, ValueError for one not known."""
    if not isinstance(name, str):
        raise TypeError(f"activation must be a string, got {type(name).__name__}")
    known = _ALIASES.get(name, name)
    if known not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join([*ACTIVATIONS, *_ALIASES])}")
    return known

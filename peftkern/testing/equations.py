"""lora_linear stated twice in plain torch with autograd, neither taken from the ops: the oracle and eager.

Without a ``weight`` the base is the identity. With an activation, or a ``rank_bias``, the branch is a bottleneck. Which vector
acts where is read from peftkern/equation.py.

A product of half-precision matrices is written as product of their fp32 values, rounded: the same result as a native
one that accumulates in fp32, at fp32 speed on every CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import equation
from ..activations import ACTIVATIONS


def acting(t: dict[str, Tensor], symbol: str) -> list[Tensor]:
    """The vectors of ``t`` that act at a place."""
    return [t[c.name] for c in equation.COEFFICIENTS if c.symbol == symbol and c.name in t]


def _bent(u: Tensor, t: dict[str, Tensor], activation: str) -> Tensor:
    u = (u + t["rank_bias"]).to(u.dtype) if "rank_bias" in t else u
    return ACTIVATIONS[activation].value(u)


def oracle(
    t: dict[str, Tensor], scaling: float, keep: Tensor | None, dropout_p: float, activation: str = "identity"
) -> Tensor:
    """The equation in the tensors' own dtype (fp64)."""
    x = t["x"].flatten(0, -2)
    dropped = x if keep is None else torch.where(keep, x / (1 - dropout_p), torch.zeros_like(x))
    d, p_b, p_d, g_b, g_d = (math.prod(acting(t, at.symbol), start=1.0) for at in equation.PLACES)
    delta = scaling * ((_bent((dropped * p_d) @ t["lora_A"].T, t, activation) * d) @ t["lora_B"].T)
    base = x * p_b if "weight" not in t else (x * p_b) @ t["weight"].T
    y = base * g_b + delta * g_d + t.get("bias", 0.0)
    return y.unflatten(0, t["x"].shape[:-1])


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a b^T in the dtype of a, accumulated in fp32."""
    return (a.float() @ b.float().T).to(a.dtype)


def _scaled(a: Tensor, t: dict[str, Tensor], symbol: str) -> Tensor:
    for vector in acting(t, symbol):
        a = (a.float() * vector.float()).to(a.dtype)
    return a


def eager(
    t: dict[str, Tensor], scaling: float, keep: Tensor | None, dropout_p: float, activation: str = "identity"
) -> Tensor:
    """PEFT's order: base, cast to the adapters' dtype, dropout, A, B, scaling, sum, cast back; vectors as in VeRA."""
    x = t["x"].flatten(0, -2)
    base = _scaled(x, t, "p_b")
    base = _scaled(mm(base, t["weight"]) if "weight" in t else base, t, "g_b")
    z = x.to(t["lora_A"].dtype)
    if keep is not None:
        z = torch.where(keep, z / (1 - dropout_p), torch.zeros((), dtype=z.dtype))
    u = _scaled(_bent(mm(_scaled(z, t, "p_d"), t["lora_A"]), t, activation), t, "d")
    delta = _scaled(mm(u, t["lora_B"]) * scaling, t, "g_d")
    if "bias" in t:
        base = (base + t["bias"]).to(base.dtype)
    return (base + delta).to(x.dtype).unflatten(0, t["x"].shape[:-1])

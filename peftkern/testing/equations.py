"""lora_linear stated twice in plain torch with autograd, neither taken from the ops: the oracle and eager.

A product of half-precision matrices is written as product of their fp32 values, rounded: the same result as a native
one that accumulates in fp32, at fp32 speed on every CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def oracle(t: dict[str, Tensor], scaling: float, keep: Tensor | None, dropout_p: float) -> Tensor:
    """The equation in the tensors' own dtype (fp64)."""
    x = t["x"].flatten(0, -2)
    dropped = x if keep is None else torch.where(keep, x / (1 - dropout_p), torch.zeros_like(x))
    one = torch.ones((), dtype=x.dtype)
    u = (dropped * t.get("delta_in_scale", one)) @ t["lora_A"].T
    delta = scaling * ((u * t.get("rank_scale", one)) @ t["lora_B"].T)
    base = (x * t.get("base_in_scale", one)) @ t["weight"].T
    y = base * t.get("base_out_scale", one) + delta * t.get("delta_out_scale", one) + t.get("bias", 0.0)
    return y.unflatten(0, t["x"].shape[:-1])


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a b^T in the dtype of a, accumulated in fp32."""
    return (a.float() @ b.float().T).to(a.dtype)


def _scale(a: Tensor, vector: Tensor | None) -> Tensor:
    return a if vector is None else (a.float() * vector.float()).to(a.dtype)


def eager(t: dict[str, Tensor], scaling: float, keep: Tensor | None, dropout_p: float) -> Tensor:
    """PEFT's order: base, cast to the adapters' dtype, dropout, A, B, scaling, sum, cast back; vectors as in VeRA."""
    x = t["x"].flatten(0, -2)
    base = _scale(mm(_scale(x, t.get("base_in_scale")), t["weight"]), t.get("base_out_scale"))
    z = x.to(t["lora_A"].dtype)
    if keep is not None:
        z = torch.where(keep, z / (1 - dropout_p), torch.zeros((), dtype=z.dtype))
    u = _scale(mm(_scale(z, t.get("delta_in_scale")), t["lora_A"]), t.get("rank_scale"))
    delta = _scale(mm(u, t["lora_B"]) * scaling, t.get("delta_out_scale"))
    if "bias" in t:
        base = (base + t["bias"]).to(base.dtype)
    return (base + delta).to(x.dtype).unflatten(0, t["x"].shape[:-1])

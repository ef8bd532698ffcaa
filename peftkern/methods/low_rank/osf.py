"""OSF on a linear layer, as HF PEFT computes it: the low singular part of W trains, what it was at first is subtracted.

    y = x W^T + (U * S) (V x) - (U_0 * S_0) (V_0 x) + bias

U (N, R), S (R), V (R, K) train; U_0, S_0 and V_0 are their first values. One branch of rank 2 R.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...bases.base import Base
from .. import tuner
from ..linear import Branch, Linear, frozen_weight, run
from ..look import Look, NotCovered
from ..registry import Held, Method, register

_NOW = ("U_low", "S_low", "V_low")
_FIRST = ("_osf_U_low_init", "_osf_S_low_init", "_osf_V_low_init")


def _branch(U: Tensor, S: Tensor, V: Tensor, U_0: Tensor, S_0: Tensor, V_0: Tensor) -> Branch:
    return Branch(torch.cat([V, V_0]), torch.cat([U, U_0], 1), d=torch.cat([S, -S_0]))


def osf_linear(
    x: Tensor, weight: Tensor | Base, U_low: Tensor, S_low: Tensor, V_low: Tensor, U_low_init: Tensor, S_low_init: Tensor,
    V_low_init: Tensor, *, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with OSF: the equation at the top of peftkern/methods/low_rank/osf.py.

    Args:
        x: (..., K). weight: (N, K). U_low: (N, R). S_low: (R). V_low: (R, K), and the same of their first values.
            bias: (N).

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    weight = frozen_weight(
        weight, bias, U_low=(U_low, "N R"), S_low=(S_low, "R"), V_low=(V_low, "R K"), U_low_init=(U_low_init, "N R"),
        S_low_init=(S_low_init, "R"), V_low_init=(V_low_init, "R K"),
    )  # fmt: skip
    return run(Linear(weight, bias).add(_branch(U_low, S_low, V_low, U_low_init, S_low_init, V_low_init)), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``osf.Linear`` holds of an adapter."""
    part = look.part("osf_svd_params").part(name)
    now = [part.tensor(key) for key in _NOW]
    first = tuner.tensors(look, name, dict.fromkeys(_FIRST))
    if {t.dtype for t in now} != {t.dtype for t in first}:
        raise NotCovered(f"the tensors of {name!r} differ in dtype")
    return Held(name, OSF, (*now, *first), rank=2 * now[1].numel())


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return y.add(_branch(*adapter.tensors))


def build(linear: nn.Linear, rank: int) -> nn.Module:
    """A model of one layer around this one. The library's rank is that of what stays frozen, at least 1."""
    return tuner.builder("OSFConfig", "effective_rank")(linear, max(1, min(linear.weight.shape) - rank))


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(rank: int):
        return peft.OSFConfig(target_modules=["0"], effective_rank=rank, init_weights=False)

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config(4)),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(7)),
    }


OSF = register(
    Method(
        name="OSF",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.osf.layer.Linear",
        adapters="osf_svd_params",
        held=held,
        apply=apply,
        function=osf_linear,
        examples=examples,
        build=build,
        op="lora_linear",
        one_active=True,
        coefficients=("d",),
        saves="x, and (M, 2 R) in fp32",
        merges="W + U diag(S) V - U_0 diag(S_0) V_0",
        peft_type="OSF",
        keeps_dtype=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

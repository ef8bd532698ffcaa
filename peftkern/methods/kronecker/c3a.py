"""C3A (Chen et al. 2024) on a linear layer, as HF PEFT computes it: the change of the weight is blocks of circulants.

    y[i, t] = (x W^T)[i, t] + 1 / K * sum over blocks j and places k of w[i, j, k - t mod b] x[j, k] + bias

w (N / b, K / b, b) trains. The library hands what an adapter gives to the next one as its input, so several active
adapters run its own code. Its gradient of x is not the equation's (``Mirrored``); a layer of it trains as it does, and
``c3a_linear`` by the equation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ...autograd.maps.circulant import add_circulant
from ...bases.base import Base
from .. import tuner
from ..linear import Linear, frozen_weight, run
from ..look import Look
from ..registry import Held, Method, register


class Correlation(NamedTuple):
    """The term of w. ``mirrored``: see ``add_circulant``."""

    w: Tensor
    mirrored: bool = False

    def onto(self, y: Tensor, x: Tensor) -> Tensor:
        """See ``Term``."""
        return add_circulant(y, x, self.w, 1.0 / x.shape[-1], mirrored=self.mirrored)


def c3a_linear(x: Tensor, weight: Tensor | Base, c3a_kernel: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """A frozen linear layer with C3A: the equation at the top of peftkern/methods/kronecker/c3a.py.

    Args:
        x: (..., K). weight: (N, K). bias: (N). c3a_kernel: (N / b, K / b, b).

    Returns (..., N). Raises as ``lora_linear`` does, and ValueError for a kernel that does not fit.
    """
    weight = frozen_weight(weight, bias, c3a_kernel=(c3a_kernel, "N/b K/b b"))
    return run(Linear(weight, bias).add_term(Correlation(c3a_kernel)), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``c3a.C3ALinear`` holds of an adapter."""
    return Held(name, C3A, tuple(tuner.tensors(look, name, {"c3a_kernel": None})))


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return y.add_term(Correlation(*adapter.tensors, mirrored=True))


def build(linear: nn.Linear, rank: int) -> nn.Module:
    """A model of one layer around this one, with the largest blocks up to the default that fit."""
    import math

    return tuner.builder("C3AConfig", None, block_size=math.gcd(256, *linear.weight.shape))(linear, rank)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(block_size: int):
        return peft.C3AConfig(target_modules=["0"], block_size=block_size, init_weights="gaussian")

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config(4)),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(2)),
    }


C3A = register(
    Method(
        name="C3A",
        taxonomy="reparameterised",
        family="S",
        layer="peft.tuners.c3a.layer.C3ALinear",
        adapters="c3a_kernel",
        held=held,
        apply=apply,
        function=c3a_linear,
        examples=examples,
        build=build,
        rank=0,
        op="lora_linear",
        saves="x",
        merges="W + the circulants of w / K",
        peft_type="C3A",
        one_active=True,
        keeps_dtype=True,
        loses_small=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

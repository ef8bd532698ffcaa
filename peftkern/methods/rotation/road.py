"""RoAd (Liao & Monz 2024) on a linear layer, as HF PEFT computes it: pairs of outputs are rotated and scaled, the bias too.

    y = h cos + rot(h) sin,  h = x W^T + bias        rot(h)_a = -h_b, rot(h)_b = h_a

A column a of the first half of a group goes with b of the second. cos = alpha * cos(theta) and sin = alpha * sin(theta)
(N): of vectors with N / 2 elements, which both columns of a pair share (road_1), with N (road_2), or with 2 N, half of
each group for cos and half for sin (road_4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from ...bases.base import Base
from ...checks import check_whole
from .. import tuner
from ..linear import Linear, Turn, frozen_weight, run
from ..look import Look, NotCovered
from ..registry import Held, Method, register

_SIZES = {"road_1": 1, "road_2": 2, "road_4": 4}  # of the vectors, in halves of N


def road_linear(
    x: Tensor, weight: Tensor | Base, road_theta: Tensor, road_alpha: Tensor, *, bias: Tensor | None = None, group_size: int = 64
) -> Tensor:  # fmt: skip
    """A frozen linear layer with RoAd: the equation at the top of peftkern/methods/rotation/road.py.

    Args:
        x: (..., K). weight: (N, K), N a multiple of group_size, which is even. bias: (N).
        road_theta, road_alpha: N / 2 elements (road_1), N (road_2) or 2 N (road_4).

    Returns (..., N). Raises as ``lora_linear`` does. The layer's output without the adapter is saved for backward.
    """
    weight = frozen_weight(weight, bias)
    check_whole("group_size", group_size, 2)
    return run(Linear(weight, bias, turns=(Turn(road_theta, road_alpha, group_size),)), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``road.Linear`` holds of an adapter."""
    variant, group_size = look.item("variant", name), look.item("group_size", name)
    if variant not in _SIZES or type(group_size) is not int or group_size % 2 or shape[0] % group_size:
        raise NotCovered(f"{name!r} has variant {variant!r} and groups of {group_size!r}")
    size = (_SIZES[variant] * shape[0] // 2,)
    tensors = tuner.tensors(look, name, {"road_theta": size, "road_alpha": size})
    return Held(name, ROAD, tuple(tensors), (group_size,))


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return y._replace(turns=(*y.turns, Turn(*adapter.tensors, *adapter.numbers)))


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(variant: str = "road_1", group_size: int = 4):
        return peft.RoadConfig(target_modules=["0"], variant=variant, group_size=group_size, init_weights=False)

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config("road_1", 2)),
        "road_2": tuner.layer(nn.Linear(K, N), config("road_2")),
        "road_4": tuner.layer(nn.Linear(K, N), config("road_4")),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config("road_4", 2)),
    }


def build(linear: nn.Linear, R: int) -> nn.Module:
    """What users make, in groups of the library's default size where they fit."""
    return tuner.builder("RoadConfig", None, group_size=math.gcd(64, linear.out_features))(linear, R)


ROAD = register(
    Method(
        name="RoAd",
        taxonomy="additive",
        family="S",
        layer="peft.tuners.road.layer.Linear",
        also=("peft.tuners.road.bnb.Linear8bitLt", "peft.tuners.road.bnb.Linear4bit"),
        adapters="road_theta",
        held=held,
        apply=apply,
        function=road_linear,
        examples=examples,
        build=build,
        rank=0,
        op="lora_linear",
        saves="x W^T + bias (M, N)",
        merges="R W and R bias",
        peft_type="ROAD",
        loses_small=True,
        widens=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

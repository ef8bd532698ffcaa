"""Invertible adapters of AdapterHub: NICE's coupling, its two subnetworks on ``bottleneck_adapter``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from adapters.methods.modeling import NICECouplingBlock
from torch import Tensor, nn

from ...autograd.residual.bottleneck_adapter import bottleneck_adapter
from ...methods.look import Look, NotCovered
from ...nn.compositions.invertible import coupled
from ...problem import Problem, problem_like
from .kind import Kind, check_gain, check_input
from .projection import Projection, activation, projection


class Subnetwork(NamedTuple):
    """f(h down^T + down_bias) up^T + up_bias, added to something."""

    down: Projection
    up: Projection
    activation: str

    def __call__(self, h: Tensor, residual: Tensor) -> Tensor:
        return bottleneck_adapter(
            h, self.down.like, self.up.like, down_bias=self.down.bias, up_bias=self.up.bias, activation=self.activation,
            residual=residual,
        )  # fmt: skip


class Coupling(NamedTuple):
    """What a block computes: x1 + F(x2), x2 + G(y1), the first half of ``split`` columns."""

    F: Subnetwork
    G: Subnetwork
    split: int


def _subnetwork(look: Look, name: str) -> Subnetwork:
    look.require(nn.Sequential, name)
    if len(look.module) != 3:
        raise NotCovered(f"{name} has {len(look.module)} parts")
    down, act, up = (look.part(str(i)) for i in range(3))
    return Subnetwork(projection(down, name), projection(up, name), activation(act, name))


def _plan(look: Look) -> Coupling:
    if look.value("conditional"):
        raise NotCovered("its subnetworks have conditions")
    F, G = (_subnetwork(look.part(name), name) for name in "FG")
    check_gain(F.down.like)
    return Coupling(F, G, look.value("split_len1"))


def _run(plan: Coupling, layer: nn.Module, x: Any, c: list | tuple = (), rev: bool = False) -> Tensor:
    check_input(x, plan.F.down.like)
    if x.dim() != 3 or x.shape[-1] != plan.F.up.shape[0] + plan.G.up.shape[0]:
        raise NotCovered(f"the input has shape {tuple(x.shape)}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.get_autocast_dtype(x.device.type):
        raise NotCovered(f"under autocast the sum would not be {torch.get_autocast_dtype(x.device.type)}")
    return coupled(x, plan.split, plan.F, plan.G, rev)


def _call(plan: Coupling, rows: int) -> Problem:
    down, up, name = plan.F
    (N, R), K = up.shape, down.shape[1]
    flags = {"down_bias": down.bias, "up_bias": up.bias, name: True, "residual": True}
    return problem_like(down.like, "bottleneck_adapter", down.like.dtype, (rows, N, K, R), flags)


KINDS = (Kind(NICECouplingBlock, _plan, _run, _call),)

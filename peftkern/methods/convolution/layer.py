"""A convolution with branches: what its methods' ``apply`` takes and gives, and how a base layer is read.

y = conv(x, W) + bias + sum over branches of conv_1x1(conv(drop(x), A), B)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...autograd.lora_conv import Call, Geometry, lora_conv
from ...autograd.shapes import autocast_dtype, cast
from .. import tuner
from ..look import Look, NotCovered
from ..registry import Plan

CLASSES = nn.Conv1d, nn.Conv2d, nn.Conv3d
_FORWARDS = {cls: cls.forward for cls in CLASSES}


class Branch(NamedTuple):
    """lora_A (R, C, kernel), lora_B (N, R, 1, ...), the scaling, the dropout of the branch's input, and DoRA's factors (N) of
    base and branch."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float = 0.0
    f: Tensor | None = None


class Convolution(NamedTuple):
    """A layer so far. One of its branches at most drops or has factors, and then it is the only one."""

    of: Geometry
    weight: Tensor  # (N, C, kernel)
    bias: Tensor | None
    branches: tuple[Branch, ...] = ()

    def add(self, branch: Branch) -> Convolution:
        """With one more branch."""
        return self._replace(branches=(*self.branches, branch))

    def run(self, x: Tensor) -> Tensor:
        """y of x (batch, C, ...) or (C, ...)."""
        of, weight, bias, branches = self
        A, B, s, p, f = branches[0]
        if x.dim() == weight.dim() - 1 and f is None:
            return self.run(x[None])[0]
        if x.dim() != weight.dim() or x.shape[1] != weight.shape[1]:
            raise ValueError(f"x has shape {tuple(x.shape)}, the weight {tuple(weight.shape)}")
        if len(branches) > 1:
            A, B = torch.cat([b.lora_A for b in branches]), torch.cat([b.lora_B * b.scaling for b in branches], 1)
            s = 1.0
        if p > 0.0:
            left = F.dropout(cast(x, A.dtype), p)  # the bits are those that PEFT draws
            if f is None:
                return lora_conv(x, weight, A, B, bias, Call(of, s), left)
            rest = _convolution(x - left, weight, bias, of)
            return _scaled(lora_conv(left, weight, A, B, None, Call(of, s, True)), f, rest, x)
        if f is None:
            return lora_conv(x, weight, A, B, bias, Call(of, s))
        if not f.requires_grad and weight.dtype == A.dtype:
            g = f.view(-1, *(1,) * (weight.dim() - 1))
            return lora_conv(x, (weight * g).to(weight.dtype), A, (B * g).to(B.dtype), bias, Call(of, s))
        plus = None if bias is None else bias.view(-1, *(1,) * (x.dim() - 2))
        return _scaled(lora_conv(x, weight, A, B, None, Call(of, s, True)), f, plus, x)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, of: Geometry) -> Tensor:
    # As torch has it: autocast casts its arguments.
    return torch.convolution(x, weight, bias, *of, False, (0,) * len(of.stride), 1)


def _scaled(h: Tensor, f: Tensor, plus: Tensor | None, x: Tensor) -> Tensor:
    # h times f (N), plus something, in the dtype of a convolution of x.
    y = h * f.view(-1, *(1,) * (h.dim() - 2))
    return cast(y if plus is None else y + plus, autocast_dtype(x) or x.dtype)


class Kind(NamedTuple):
    """What a plan knows of a convolution beside its tensors (registry.Kind)."""

    of: Geometry

    by, takes_ids = "torch's convolutions", False

    def start(self, weight: Tensor, bias: Tensor | None) -> Convolution:
        return Convolution(self.of, weight, bias)

    def refuses(self, plan: Plan, x: Tensor) -> str | None:
        weight, missing = plan.weight, plan.weight.dim() - x.dim()
        # Without a batch PEFT's DoRA takes its magnitudes for those of other dimensions.
        batched = missing == 0 or (missing == 1 and not any(h.method.variant for h in plan.held))
        return None if batched and x.shape[1 - missing] == weight.shape[1] else f"the input has shape {tuple(x.shape)}"

    def nothing(self, weight: Tensor) -> Tensor:
        return weight.new_empty((0, *weight.shape[1:]))


def base(look: Look) -> tuple[Tensor, Tensor | None, Kind]:
    """Weight, bias and geometry of the base layer, one of torch's convolutions."""
    part = look.part("base_layer")
    if part is None or type(part.module) not in CLASSES:
        raise NotCovered("its base_layer is no convolution of torch's own")
    part.require(type(part.module), "base_layer")
    if type(part.module).forward is not _FORWARDS[type(part.module)]:
        raise NotCovered("the forward of its base_layer's class was replaced")
    part.class_stays()
    if part.value("groups") != 1:
        # What PEFT adds there is no convolution with these groups, and it can't be merged.
        raise NotCovered("the convolution has groups")
    if part.value("padding_mode") != "zeros":
        raise NotCovered("PEFT pads the branch with zeros, the base layer pads otherwise")
    weight, bias = tuner.frozen_tensors(part)
    of = Geometry(*(part.value(name) for name in Geometry._fields))
    if isinstance(of.padding, str):
        raise NotCovered(f"padding {of.padding!r}")
    if set(of.dilation) != {1}:
        raise NotCovered("PEFT leaves the base layer's dilation out of the branch")
    return weight, bias, Kind(of)

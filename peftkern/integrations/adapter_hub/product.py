"""The frozen product of a linear layer of AdapterHub's in which no adapter acts.

    y = x W^T + bias

The library puts such layers in the place of most linear layers of a model, whatever its adapters are. One is taken where ours is
the faster product of this CPU, dtype and size (peftkern/dispatch/cpu_base.py); elsewhere there is nothing to gain.
"""

from __future__ import annotations

import dataclasses

import torch
from adapters.methods.lora import LoRALayer, LoRALinearTorch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ...autograd.shapes import autocast_dtype
from ...checks import FLOATING
from ...dispatch.choose import Declined, choose
from ...dispatch.explain import passes
from ...dispatch.least import PRODUCT, least_work
from ...methods.linear import Linear, run
from ...methods.look import NotCovered
from ...methods.registry import Plan
from ...problem import CpuWay
from ...settings import current
from ..report import ROWS
from ..status import NO_GAIN
from .kind import check_input


def _gains(plan: Plan, rows: int, dtype: torch.dtype) -> bool:
    # Whether the product is ours in some pass. Elsewhere an op around the vendor's would be all that is new.
    if is_dynamo_compiling():  # a graph does not ask
        return False
    call = dataclasses.replace(plan.call(rows), dtype=dtype)
    try:
        ways = [choose(problem, current()).way for problem in passes(call)]
    except Declined:
        return False
    return any(type(way) is CpuWay and way.kind not in ("", "vendor") for way in ways)


def counts(layer: LoRALayer) -> bool:
    """Whether this is a layer to accelerate: with adapters, or by its product alone."""
    if len(layer.loras) or type(layer) is not LoRALinearTorch:
        return len(layer.loras) > 0
    weight = layer.weight
    return (
        not weight.requires_grad
        and weight.dtype in FLOATING
        and _gains(Plan(weight, layer.bias, []), ROWS, weight.dtype)
    )


def product_plan(weight: Tensor, bias: Tensor | None) -> Plan:
    """What a layer without an active adapter computes. Raises NotCovered where ours is not the faster product."""
    plan = Plan(weight, bias, [])
    if not _gains(plan, ROWS, weight.dtype):
        raise NotCovered(f"it has no active adapter: {NO_GAIN}")
    return plan


def product(plan: Plan, x: Tensor) -> Tensor:
    """y of x. Raises NotCovered where ours is not the faster product for so many rows, in autocast's dtype."""
    check_input(x, plan.weight)
    if x.dim() < 1 or x.shape[-1] != plan.weight.shape[1]:
        raise NotCovered(f"the input has shape {tuple(x.shape)}")
    if not _gains(plan, x.shape[:-1].numel(), autocast_dtype(x) or x.dtype):
        raise NotCovered(NO_GAIN)
    return run(Linear(plan.weight, plan.bias), x)


def least(plan: Plan) -> int:
    """The elements of x below which the library's own code is faster."""
    return -(-least_work(PRODUCT, current()) // max(len(plan.weight), 1))

"""LoRA and (IA)^3 of AdapterHub on ``lora_linear``: a ``LoRALinearTorch``, which stands in the place of the linear layer.

    LoRA     y = x W^T + bias + alpha / r * drop(x) A^T B^T         with a gate, its mean over the sequence instead of alpha / r
    (IA)^3   y = alpha * l * (x W^T + bias)                         l (N) is called lora_B

for one active adapter that the layer has, alone or in a ``Stack`` with others that it has not. Where none acts, the frozen
product is all there is (product.py).
"""

from __future__ import annotations

from types import FunctionType
from typing import NamedTuple

import torch
from adapters.composition import Stack
from adapters.context import ForwardContext
from adapters.methods import lora as theirs
from torch import Tensor, nn

from ...dispatch.least import GATE, least_work
from ...methods import tuner
from ...methods.linear import Branch, Linear, run
from ...methods.look import Look, NotCovered
from ...methods.low_rank.lora import LORA
from ...methods.registry import Held, Plan
from ...methods.scale.ia3 import IA3
from ...problem import Problem
from ...settings import current
from . import product
from .kind import Kind, check_input


class Adapted(NamedTuple):
    """The layer with its adapter. ``gate``: a module that is called, or None."""

    plan: Plan
    name: str = ""
    gate: nn.Module | None = None


def _active(look: Look) -> str | None:
    # The one adapter that a call takes, None where none acts.
    if look.value("merged"):
        raise NotCovered("its adapters are merged into the base weight")
    setup, present = look.module.get_active_setup(), look.module.loras
    if setup is None:
        return None
    if type(setup) is not Stack or not all(isinstance(name, str) for name in setup):
        raise NotCovered(f"its adapters are composed: {setup!r}")
    names = [name for name in setup if name in present]
    if len(names) > 1:
        raise NotCovered("of several active adapters each takes the output of the one before")
    return names[0]


def _dropout_p(adapter: Look) -> float:
    own = adapter.value("lora_dropout")
    if own is not None:  # a function that gives back its input
        if type(own) is not FunctionType or own.__module__ != theirs.__name__:
            raise NotCovered("its dropout was replaced")
        return 0.0
    drop = adapter.part("lora_dropout")
    drop.require(nn.Dropout, "lora_dropout")
    p = drop.value("p")
    if drop.value("inplace") or not 0.0 <= p < 1.0:
        raise NotCovered("its dropout is in place or drops everything")
    return p if drop.value("training") else 0.0


def _held(adapter: Look, name: str, shape: tuple[int, int]) -> Held:
    cls, (N, K) = type(adapter.module), shape
    if cls is theirs.IA3:
        return Held(name, IA3, (_tensor(adapter, "lora_B", (N, 1)),), (False,))
    if cls is not theirs.LoRA:
        raise NotCovered(f"adapter {name!r} is a {cls.__name__}")
    if adapter.value("use_dora"):
        raise NotCovered(
            f"adapter {name!r} is DoRA, whose norm has neither alpha / r nor a gradient of its own in other libraries"
        )
    A = adapter.tensor("lora_A")
    tensors = _tensor(adapter, "lora_A", (len(A), K)), _tensor(adapter, "lora_B", (N, len(A))), None
    return Held(name, LORA, tensors, (float(adapter.value("scaling")),), _dropout_p(adapter), len(A))


def _tensor(adapter: Look, name: str, shape: tuple[int, int]) -> Tensor:
    t = adapter.tensor(name)
    if not tuner.plain_or_none(t) or t is None or t.shape != shape:
        raise NotCovered(f"{name} is not a plain tensor of shape {shape}")
    return t


def _plan(look: Look) -> Adapted:
    name = _active(look)
    weight, bias = tuner.frozen_tensors(look)
    if look.value("fan_in_fan_out"):
        weight = look.transposed(weight)
    if name is None:
        return Adapted(product.product_plan(weight, bias))
    adapter = look.part("loras").part(name)
    adapter.require(type(adapter.module), f"adapter {name!r}")
    held = _held(adapter, name, weight.shape)
    gate = adapter.part("gate").module if adapter.value("use_gating") else None
    if gate is not None and held.method is IA3:
        raise NotCovered(f"adapter {name!r} is (IA)^3 with a gate")
    return Adapted(Plan(weight, bias, [held]), name, gate)


def _run(adapted: Adapted, layer: nn.Module, input_states: Tensor) -> Tensor:
    (plan, name, gate), x = adapted, input_states
    if not plan.held:
        return product.product(plan, x)
    (held,) = plan.held
    for t in (held.tensors[0], plan.weight, plan.bias):
        if t is not None:
            check_input(x, t)
    per_sequence = gate is not None or held.method is IA3
    if x.dim() < 1 or x.shape[-1] != plan.weight.shape[1] or (per_sequence and x.dim() != 3):
        raise NotCovered(f"the input has shape {tuple(x.shape)}")
    if held.method is IA3:
        if torch.is_autocast_enabled(x.device.type):
            raise NotCovered("under autocast the library's output is wider")
        alpha = layer.loras[name].scaling
        if alpha != 1:
            plan = plan._replace(held=[held._replace(tensors=(held.tensors[0] * alpha,))])
    if gate is None:
        return plan.run(x)
    if ForwardContext.get_context() is None:
        raise NotCovered("it is called outside of a model's forward")
    (A, B, _), p = held.tensors, held.dropout_p
    score = torch.mean(torch.sigmoid(gate(x)), dim=1).unsqueeze(-1)
    y = run(Linear(plan.weight, plan.bias).add(Branch(A, B, 1.0, p, route=lambda _: score)), x)
    layer._store_gating_score(name, score)
    return y


def _least(adapted: Adapted) -> int:
    if not adapted.plan.held:
        return product.least(adapted.plan)
    return max(adapted.plan.least(), 0 if adapted.gate is None else least_work(GATE, current()))


def _call(adapted: Adapted, rows: int) -> Problem:
    return adapted.plan.call(rows)


KINDS = (Kind(theirs.LoRALinearTorch, _plan, _run, _call, _least),)

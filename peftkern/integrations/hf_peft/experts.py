"""Experts whose parameters LoRA adapts (``target_parameters``): each expert computes base and branch of its own rows.

PEFT adds s B A to the whole parameter (E, N, K) of a mixture's experts at every forward, for experts without a token too, and
takes the gradient of the whole sum in backward. What the layer computes is

    y_t = sum over the experts e of token t of c[t, e] * Down_e(gate(Up_e(x_t))),      Up_e, Down_e: (W[e] + s B[e] A[e]) x + b[e]

of which nothing of a parameter's size has to be made (peftkern/autograd/expert_lora_linear.py), on the modules that are under
transformers' contract (peftkern/integrations/experts/contract.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ...autograd.expert_lora_linear import by_expert
from ...methods import tuner
from ...methods.linear import Linear
from ...methods.linear import run as run_linear
from ...methods.look import PLAIN_TENSORS, Look, NotCovered, Record, read
from ...methods.low_rank import lora
from ...methods.registry import Held, Plan
from ..experts import contract
from .fsdp import trains

# The releases whose wrapper, and whose contract, this file repeats.
TESTED = {"peft": (peft.__version__, (0, 21)), "transformers": contract.TRANSFORMERS}


class Projection(NamedTuple):
    """A linear layer of each expert. weight (E, N, K), bias (E, N); ``held``: LoRA's, with A (E, R, K) and B (E, N, R)."""

    weight: Tensor
    bias: Tensor | None
    held: list[Held]

    def run(self, x: Tensor, counts: list[int], tokens: Tensor) -> Tensor:
        """y (M, N) of rows (M, K) that are sorted by expert."""
        weight, bias, held = self
        W, b = weight.unbind(), [None] * len(weight) if bias is None else bias.unbind()
        each = [(h, *(t.unbind() for t in h.tensors[:2])) for h in held]

        def layer(e: int, rows: Tensor) -> Tensor:
            if not each:
                return run_linear(Linear(W[e], b[e]), rows)
            return Plan(W[e], b[e], [h._replace(tensors=(A[e], B[e], None)) for h, A, B in each]).run(rows)

        return by_expert(x, counts, weight.shape[1], layer)


class ExpertsPlan(NamedTuple):
    """What a call of an experts module computes. ``experts``: the module, for its gate and norm."""

    experts: nn.Module
    up: Projection
    down: Projection

    def one(self) -> Plan:
        """The layer of one expert, which says who computes all of them."""
        weight, bias, held = self.up if self.up.held else self.down
        alone = [h._replace(tensors=(h.tensors[0][0], h.tensors[1][0], None)) for h in held]
        return Plan(weight[0], None if bias is None else bias[0], alone)

    def run(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """y (T, K) of tokens x (T, K), their experts (T, k) and the weights of those (T, k)."""
        return contract.mixed(self.experts, (x, index, weights), self.up.run, self.down.run)


def wrappers(layer: ParamWrapper) -> list[ParamWrapper]:
    """The wrappers of one module's parameters, this one first: PEFT nests them, one for each parameter."""
    chain = [layer]
    while type(chain[-1].base_layer) is ParamWrapper:
        chain.append(chain[-1].base_layer)
    return chain


def base_reason(layer: ParamWrapper) -> str | None:
    """Why the module whose parameters are adapted is none of transformers' experts, or the release none that is known, or
    None."""
    for library, (version, known) in TESTED.items():
        reason = contract.release_reason(library, version, known)
        if reason is not None:
            return reason
    chain = wrappers(layer)
    base = type(chain[-1].base_layer)
    if not contract.under_contract(base):
        names = ", ".join(w.parameter_name for w in chain)
        return f"target_parameters ({names} of {base.__name__}) are adapted inside the base layer, which is not covered"
    return None


def _projection(part: Look, name: str, around: dict[str, Look]) -> Projection:
    weight = part.tensor(name, frozen=True)
    bias = part.tensor(f"{name}_bias") if part.value("has_bias") else None
    if type(weight) not in PLAIN_TENSORS or not tuner.plain_or_none(bias) or weight.dim() != 3:
        raise NotCovered(f"{name} is no plain tensor of three dimensions")
    weight = part.without_gradient(name, weight)
    if weight.requires_grad:
        raise NotCovered(f"{name} requires grad")
    if weight.device.type != "cpu":
        raise NotCovered(f"experts on {weight.device.type} were not measured")
    if part.value("is_transposed"):
        weight = weight.transpose(1, 2)
    level = around.pop(name, None)
    active = [] if level is None else tuner.adapters(level, "lora_A", None)
    return Projection(weight, bias, [_held(level, adapter, weight) for adapter in active])


def _held(level: Look, name: str, weight: Tensor) -> Held:
    E, N, K = weight.shape
    held = lora.held(level, name, (N, K))
    A, B, bias = held.tensors
    if held.method is not lora.LORA or bias is not None or E < 2 or held.rank % E:
        raise NotCovered(f"adapter {name!r} is not one of {E} experts")
    if A.dtype not in (weight.dtype, torch.float32):
        raise NotCovered(f"adapter {name!r} is {A.dtype}, the experts are {weight.dtype}")
    return held._replace(tensors=(*contract.split(A, B, E), None), rank=held.rank // E)


def look_at(layer: ParamWrapper) -> ExpertsPlan:
    """The plan of this layer. Raises NotCovered with the reason."""
    look, around = Look(layer, Record(read, trains)), {}
    while type(look.module) is ParamWrapper:
        tuner.check_state(look)
        around[look.value("parameter_name")] = look
        look = look.part("base_layer")
        look.require(type(look.module), "base_layer")
    contract.implementation(look.module)
    up, down = (_projection(look, weight, around) for weight in contract.projections(look.module))
    if up.weight.dtype != down.weight.dtype:
        raise NotCovered("its projections differ in dtype")
    if around:
        raise NotCovered(f"{', '.join(around)} of {type(look.module).__name__} is not the weight of a projection")
    if not up.held and not down.held:
        raise NotCovered("it has no active adapter")
    return ExpertsPlan(look.module, up, down)


def call_plan(layer: ParamWrapper, x: Any, *args: Any) -> ExpertsPlan:
    """What a call with these tokens, experts and their weights computes. Raises NotCovered with the reason."""
    plan = look_at(layer)
    if len(args) != 2 or any(type(t) not in PLAIN_TENSORS for t in (x, *args)):
        raise NotCovered("the call has arguments of its own")
    index, weights = args
    if x.dim() != 2 or index.dim() != 2 or index.shape != weights.shape or len(index) != len(x):
        raise NotCovered(f"the call has shapes {tuple(x.shape)}, {tuple(index.shape)}, {tuple(weights.shape)}")
    if x.dtype != plan.up.weight.dtype and not torch.is_autocast_enabled("cpu"):
        raise NotCovered(f"the input is {x.dtype}, the experts are not")
    return plan

"""Experts with attached adapters (``target_parameters``): each token takes its own adapter, whichever experts it goes to.

    Up_e, Down_e of token t: (W[e] + s[a] B[a, e] A[a, e]) x + b[e],      a the adapter of t

The rows of an expert are one batch of many adapters on its matrices (``multi_lora_linear``), of which a row may take none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...autograd.expert_lora_linear import by_expert
from ...autograd.multi_lora_linear import multi_lora_linear, sgmv
from ...methods.look import PLAIN_TENSORS, NotCovered
from ...methods.stored import Unfit
from ..attach.checkpoint import Part
from ..attach.keys import INNER
from ..attach.layer import Attached, forward_reason
from ..attach.request import Batch, Each, Entry
from . import contract


class Stack(NamedTuple):
    """LoRA on a weight of all experts: A (E, R, K), B (E, N, R) and s."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


def reason(module: nn.Module) -> str | None:
    """Why this module is none of transformers' experts that can carry attached adapters, or None."""
    if not contract.under_contract(type(module)):
        return "is no module of experts under transformers' use_experts_implementation"
    why = contract.release_reason("transformers", *contract.TRANSFORMERS)
    if why is not None:
        return f"is a mixture's: {why}"
    why = forward_reason(module)
    if why is not None:
        return why
    try:
        contract.implementation(module)
    except NotCovered as error:
        return f"is not covered: {error}"
    for name in contract.projections(module):
        weight = getattr(module, name)
        if type(weight) not in PLAIN_TENSORS or weight.dim() != 3 or weight.device.type != "cpu":
            return f"has a {name} that is no plain tensor of three dimensions on a CPU"
    return None


def takes(module: nn.Module) -> bool:
    """Whether adapters of this module are those of its parameters: whether it is one of experts."""
    return contract.under_contract(type(module))


def parameters(module: nn.Module, part: Part) -> list[str]:
    """The parameters of a module that an adapter is of by its settings, in the order in which PEFT wraps them."""
    named = part.method.stored.parameters(part.settings, part.module)
    return [name for name, _ in module.named_parameters(recurse=False) if name in named]


def _places(experts: nn.Module, part: Part) -> list[tuple[str, str]]:
    # (name of a weight, prefix of its tensors) of an adapter. Raises Unfit for parameters that are none of these.
    own = parameters(experts, part)
    if len(part.keys) != 2 * len(own) or not set(own) <= {*contract.projections(experts)}:
        raise Unfit("target_parameters", f"mean {', '.join(own)} of {part.module}, which are not served together")
    return list(zip(own, [INNER, ""][-len(own) :]))


def sizes(experts: nn.Module, part: Part) -> dict[str, int]:
    """The sizes that the axes of an adapter's tensors must have."""
    found = {}
    for name, prefix in _places(experts, part):
        E, N, K = weight_of(experts, name).shape
        rank = E * part.method.stored.rank(part.settings, f"{part.module}.{name}")
        found |= dict(zip("HOI" if prefix else "GNK", (rank, N, K)))
    return found


def adapter(experts: nn.Module, part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Stack]:
    """What a module keeps of an adapter with these tensors."""
    found = {}
    for name, prefix in _places(experts, part):
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(INNER) == bool(prefix)}
        (A, B, _), (scaling,) = part.method.stored.take(part.settings, f"{part.module}.{name}", own)
        found[name] = Stack(*contract.split(A, B, len(experts.down_proj)), scaling)
    return found


def weight_of(experts: nn.Module, name: str) -> Tensor:
    """The weight (E, N, K) of a projection."""
    weight = getattr(experts, name)
    return weight.transpose(1, 2) if experts.is_transposed else weight


class AttachedExperts(Attached):
    """The forward of a module of experts."""

    slots = "the numbers of adapters"  # which all modules of a model share

    def __init__(self, owner, name: str, module: nn.Module, dtype: torch.dtype):
        super().__init__(owner, name, module)
        self._dtype = dtype
        self._adapters: dict[int, dict[str, Stack]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of its adapters."""
        stacks = [stack for each in list(self._adapters.values()) for stack in each.values()]
        return sum(t.nbytes for stack in stacks for t in stack[:2])

    def add(self, entry: Entry, adapter: Mapping[str, Stack]) -> None:
        """Keep an adapter: by the names of the weights that it changes."""
        kept = {name: Stack(A.to(self._dtype), B.to(self._dtype), s) for name, (A, B, s) in adapter.items()}
        self._adapters[entry.number] = kept
        entry.ids[self] = entry.number

    def remove(self, entry: Entry) -> None:
        """Forget it."""
        del self._adapters[entry.number]

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        call = hidden_states, top_k_index, top_k_weights
        if torch.compiler.is_compiling():
            return torch.ops.peftkern.attached_experts(*call, self.number, self.owner.graph_batch)
        return self.run(*call)

    def run(self, x: Tensor, index: Tensor, weights: Tensor, batch: Batch | None = None) -> Tensor:
        """y (T, K) of tokens x (T, K), their experts (T, k) and the weights of those (T, k)."""
        call = x, index, weights
        return self.serve(x, batch, lambda: self.inner(*call), lambda ids, each: self._adapted(call, ids, each))

    def _adapted(self, call: tuple[Tensor, Tensor, Tensor], ids: Tensor, each: Each) -> Tensor:
        numbers = sorted({*each.ids} - {-1})
        up, down = (self._projection(name, ids, numbers) for name in contract.projections(self.module))
        return contract.mixed(self.module, call, up, down)

    def _projection(self, name: str, ids: Tensor, numbers: list[int]) -> contract.Project:
        held = [(number, self._adapters[number][name]) for number in numbers if name in self._adapters[number]]
        W, bias = weight_of(self.module, name), getattr(self.module, f"{name}_bias") if self.module.has_bias else None
        trains = torch.is_grad_enabled() and W.requires_grad
        own = torch.full_like(ids, -1)
        for i, (number, _) in enumerate(held):
            own.masked_fill_(ids == number, i)

        def project(rows: Tensor, counts: list[int], tokens: Tensor) -> Tensor:
            parts = own[tokens].split([*counts, len(tokens) - sum(counts)])

            def layer(e: int, x: Tensor) -> Tensor:
                b = None if bias is None else bias[e]
                if not held:
                    return F.linear(x, W[e], b)
                adapters = [(stack.lora_A[e], stack.lora_B[e], stack.scaling) for _, stack in held]
                if trains:  # as it was: the fused op has no gradient for a weight
                    return F.linear(x, W[e], b) + sgmv(x, adapters, parts[e])
                return multi_lora_linear(x, W[e], adapters, parts[e], bias=b)

            return by_expert(rows, counts, W.shape[1], layer)

        return project

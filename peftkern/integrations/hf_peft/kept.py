"""The plan of a layer's last call, for as long as everything that it was made from looks the same.

Nothing of the layer is kept alive by it: a kept plan is a pattern (methods/unchanged.py) and a form that the layer's
tensors of the moment are filled into. Anything that differs takes the careful path, which keeps its plan anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...methods.look import Look
from ...methods.registry import Held, Plan
from ...methods.unchanged import Pattern, Unchanged, at, call, equal, instance, last, same
from ...methods.unchanged import keep as holds

# What calling a NamedTuple does, without the frame of its own __new__.
_new = tuple.__new__


def _input(x: Tensor, linear: bool) -> Pattern:
    # A nested tensor of no subclass has no shape, so it never matches.
    facts = {"dtype": same(x.dtype), "device": equal(x.device), "layout": same(x.layout)}
    if linear:
        facts["shape"] = last(x.shape[-1])
    return instance(type(x), {}, facts)


def _autocast(device: str) -> Pattern:
    return call(torch.is_autocast_enabled, (device,), same(torch.is_autocast_enabled(device)))


class Kept:
    """A plan without its tensors.

    ``mixed``: the adapters of the mixed batch that it is for, or None; ``again``: what such a call can take over (mixed.py).
    ``seen``: (layer, input) -> what the pattern keeps of them, or None if anything is not as it was.
    """

    __slots__ = ("_bias", "_held", "_kind", "_transposed", "_weight", "again", "mixed", "seen")

    def __init__(self, match: Any, plan: Plan, slots: Mapping[int, int], transposed: bool, mixed: Sequence[str] | None):
        self.seen, self._kind, self._transposed, self.mixed = match, plan.kind, transposed, mixed
        self.again: Any = None
        self._weight, self._bias = slots[id(plan.weight)], slots[id(plan.bias)]
        self._held = [(h.name, h.method, [slots[id(t)] for t in h.tensors], h[3:]) for h in plan.held]

    def plan(self, layer: nn.Module, x: Any) -> Plan | None:
        """What a call with this input computes, or None if anything is not as it was."""
        now = self.seen(layer, x)
        if now is None:
            return None
        weight = now[self._weight]  # as `base` says, without its frame
        if self._transposed:
            weight = weight.t()
        held, of = [], now.__getitem__
        for name, method, slots, rest in self._held:  # a comprehension would be one more frame
            held.append(_new(Held, (name, method, tuple(map(of, slots)), *rest)))
        return _new(Plan, (weight, now[self._bias], held, self._kind))

    def base(self, now: tuple) -> tuple[Tensor, Tensor | None]:
        """The layer's weight and bias, of what was ``seen``."""
        weight = now[self._weight]
        return weight.t() if self._transposed else weight, now[self._bias]

    def places(self) -> list[list[int]]:
        """Where the tensors of each adapter are in what is ``seen``."""
        return [slots for _, _, slots, _ in self._held]


def keep(look: Look, plan: Plan, x: Tensor, mixed: Sequence[str] | None, process: Sequence[Pattern]) -> Kept | None:
    """The plan that was made by this look at a layer and for this input, to be kept, or None if a pattern cannot say
    when it holds. ``process``: patterns of what is the same for all layers."""
    if Unchanged is None:
        return None
    record = look.record
    tensors = [t for _, _, t, _ in record.slots]
    slots = {id(t): i for i, t in enumerate(tensors) if t is not None}
    if not record.whole or len(slots) < sum(t is not None for t in tensors):
        return None  # a tensor in two places may be two later
    slots[id(None)] = nothing = len(tensors)
    transposed = id(plan.weight) in record.transposed
    if transposed:
        slots[id(plan.weight)] = slots.get(id(record.transposed[id(plan.weight)]), nothing)
    used = [plan.weight, plan.bias]
    used += [t for h in plan.held for t in h.tensors]
    if not all(id(t) in slots for t in used) or slots[id(plan.weight)] == nothing:
        return None
    if any(isinstance(n, Tensor) for h in plan.held for n in h.numbers):
        return None
    record.finish()
    patterns = (
        look.pattern,
        _input(x, plan.kind is None),
        at(None, holds(nothing, same(None))),
        *process,
        _autocast(x.device.type),
    )
    return Kept(Unchanged(*patterns).match, plan, slots, transposed, mixed)

"""Layers whose weights FSDP holds: what a forward finds in their place, and units of FSDP inside a layer.

FSDP1 turns the parameters of a unit into views of one flat parameter, which requires grad as soon as one of them does;
the original parameter says which ones train. FSDP2 (``fully_shard``) holds shards and has plain parameters during
forward. A part of a layer may be a unit of its own (PEFT's ``fsdp_auto_wrap_policy`` makes one of every trained
weight): its weight is whole only while that unit runs, so the layer's forward runs inside such units.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ...nn import flat_parameter

_FSDP = "torch.distributed.fsdp"
_TWIN_OF = "_peftkern_twin_of"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def _known_as(part: nn.Module) -> nn.Module:
    # The module that FSDP knows.
    return part.__dict__.get(_TWIN_OF, part)


def trains(part: nn.Module, name: str, weight: Tensor) -> bool:
    """Whether this parameter of ``part`` gets a gradient that is kept: FSDP1's views ask for one even if frozen."""
    return flat_parameter.trains(_known_as(part), name, weight)


class Unit(NamedTuple):
    """A part of a layer that is an FSDP unit: ``parent[key]`` is it, ``inner`` has the forward that it runs."""

    parent: dict[str, nn.Module]
    key: str
    inner: nn.Module
    cls: type  # of the module that was made a unit

    def plain(self) -> nn.Module:
        """The module without FSDP, with the weights of this moment."""
        twin = self.cls.__new__(self.cls)
        twin.__dict__.update(self.inner.__dict__, **{name: {} for name in _HOOKS})
        twin.__dict__.pop("forward", None)
        twin.__dict__[_TWIN_OF] = self.inner
        return twin


def _unit(parent: dict[str, nn.Module], key: str, fsdp) -> Unit | None:
    part = parent.get(key)
    hooks = [hook for name in _HOOKS for hook in part.__dict__[name].values()] if isinstance(part, nn.Module) else []
    if isinstance(part, fsdp.FullyShardedDataParallel):
        inner = part._fsdp_wrapped_module
        cls = type(inner)
        hooks += [hook for name in _HOOKS for hook in inner.__dict__[name].values()]
    elif isinstance(part, fsdp.FSDPModule):
        state = part._get_fsdp_state()
        hooks = [hook for hook in hooks if getattr(hook, "__self__", None) is not state]
        inner = part
        # fully_shard gave the module a subclass of its class; the kin of FSDPModule stand at other places.
        cls = type(part).__mro__[getattr(part, "_orig_cls_mro_index", 2)]
    else:
        return None
    # Other hooks, and another forward, are meant for the part alone.
    return None if hooks or "forward" in inner.__dict__ else Unit(parent, key, inner, cls)


def units(layer: nn.Module, names: Any = None) -> list[Unit]:
    """The parts of a LoRA layer that are FSDP units, as far as a call needs them, in an order that all ranks share.

    ``names``: the adapter_names of a mixed batch. Empty if the call runs the base layer alone, or a LoRA variant.
    """
    fsdp = sys.modules.get(_FSDP)
    if fsdp is None or not isinstance(layer, LoraLayer) or layer._disable_adapters or layer.merged_adapters:
        return []
    asked = layer.active_adapters if names is None else names
    if not isinstance(asked, (list, tuple)):
        return []
    lora_A, lora_B = (layer._modules[n]._modules for n in ("lora_A", "lora_B"))
    present = [n for n in lora_A if n in asked]
    if not present or any(n in layer.lora_variant for n in present):
        return []
    parts = [(layer._modules, "base_layer"), *((m, n) for n in present for m in (lora_A, lora_B))]
    return [unit for part in parts if (unit := _unit(*part, fsdp)) is not None]


@contextlib.contextmanager
def plain_parts(of: list[Unit]) -> Iterator[None]:
    """Put the modules without FSDP in the place of these units."""
    parts = [unit.parent[unit.key] for unit in of]
    try:
        for unit in of:
            unit.parent[unit.key] = unit.plain()
        yield
    finally:
        for unit, part in zip(of, parts, strict=True):
            unit.parent[unit.key] = part


def run_inside(of: list[Unit], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """``call(x)`` while all of these units run, each inside the one before: so FSDP gathers their weights first, and
    again before the backward of what comes out. Like FSDP itself, for one thread at a time."""

    def enter(depth: int, x: Tensor) -> Tensor:
        if depth == len(of):
            with plain_parts(of):
                return call(x)

        def forward(own: Tensor) -> Tensor:
            # FSDP may have cast it for this part alone, which the layer does itself where it must.
            return enter(depth + 1, own if own.dtype == x.dtype else x)

        unit = of[depth]
        part = unit.parent[unit.key]
        unit.inner.__dict__["forward"] = forward
        try:
            return part(x)
        finally:
            unit.inner.__dict__.pop("forward", None)

    return enter(0, x)


def _fully_sharded() -> set[tuple[int, str]]:
    # Parameters of the process that fully_shard makes whole and plain in forward: (id of the module, name).
    if _FSDP not in sys.modules:
        return set()
    from torch.distributed._composable_state import _module_state_mapping

    found = set()
    for state in {ref() for ref in list(_module_state_mapping.values())}:
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for p in (p for group in groups if group is not None for p in group.fsdp_params):
            if not p.is_dtensor:  # else tensor parallel too
                info = p._module_info
                found.add((id(info.module), info.param_name))
                found.update((id(m), n) for m, n in zip(info.shared_modules, info.shared_param_names, strict=True))
    return found


class AtRest:
    """Reads parameters as a forward will find them: a parameter that FSDP holds as a shard is read as a stand-in of its
    full shape without contents. To be made anew for every question, unless ``units_alone``: in the forward of a model
    no parameter is a shard any more but those of units inside the layer."""

    def __init__(self, read: Callable[[nn.Module, str], Any], *, units_alone: bool = False):
        self._read = read
        self._sharded = set() if units_alone else _fully_sharded()

    def __call__(self, part: nn.Module, name: str) -> Any:
        t = self._read(part, name)
        if not isinstance(t, Tensor):
            return t
        sharded = _TWIN_OF in part.__dict__ or getattr(t, "_fsdp_flattened", False)
        if not sharded and (id(part), name) not in self._sharded:
            return t
        if isinstance(part, nn.Linear):
            N, shape = part.out_features, (part.out_features, part.in_features)
        elif hasattr(part, "nf"):  # transformers' Conv1D
            N, shape = part.nf, (part.nx, part.nf)
        else:
            return t
        full = torch.empty((), dtype=t.dtype, device=t.device).expand(shape if name == "weight" else (N,))
        return full.requires_grad_(t.requires_grad)

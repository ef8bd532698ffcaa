"""The classes of AdapterHub's modules that run fused, and those that stay as they are."""

from __future__ import annotations

from adapters.methods.lora import LoRALayer
from adapters.methods.modeling import GLOWCouplingBlock
from adapters.methods.prefix_tuning import FlatPrefixTuning, PrefixTuning
from adapters.methods.prompt_tuning import PromptTuning
from torch import nn

from . import bottleneck, invertible, lora, product, reft
from .kind import Kind

KINDS: dict[type, Kind] = {kind.cls: kind for part in (bottleneck, invertible, lora, reft) for kind in part.KINDS}

_PREFIX = "it makes keys and values for attention, beside which there is nothing to fuse"
_LEFT: dict[type, str] = {
    GLOWCouplingBlock: "its coupling scales by what the subnetworks give: no bottleneck in the residual stream",
    PrefixTuning: _PREFIX,
    FlatPrefixTuning: _PREFIX,
    PromptTuning: "it lengthens the input by trained tokens, beside which there is nothing to fuse",
}


def owned(module: nn.Module) -> bool:
    """Whether this is a module that computes an adapter of the library."""
    if isinstance(module, LoRALayer):  # in the place of a linear layer, with and without adapters
        return product.counts(module)
    return isinstance(module, (*KINDS, *_LEFT))


def left(module: nn.Module) -> str | None:
    """Why no module of this type runs fused, or None. Exact: a subclass may compute anything."""
    cls = type(module)
    if cls in KINDS:
        return None
    return _LEFT.get(cls, f"layer type {cls.__module__}.{cls.__qualname__} is not covered")

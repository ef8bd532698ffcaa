"""Base layers of libraries that quantise, as bases: known by the names of their classes, so that none of them is imported.

A base shares the storage of what the layer holds at this call, so a layer that was moved, quantised anew or given another
state is seen as it is. What is computed is y = x W^T + bias with the W of peftkern/bases, in the dtype of x: neither x nor
the bias is rounded to the library's compute dtype, nor to 8 bits (bitsandbytes in eval mode).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..autograd.shapes import cast
from ..bases.base import Base, base_of, computed_in, kind_of
from .look import PLAIN_TENSORS, Look, NotCovered, Record
from .look import read as attribute


class Frozen(NamedTuple):
    """A base layer. ``uncast``: whether it gives the dtype of its input under autocast too, so that all of it runs outside."""

    weight: Tensor | Base  # (N, K)
    bias: Tensor | None
    uncast: bool = False


def _four_bits(part: Look) -> tuple[Base, bool]:
    layer, state = part.module, getattr(part.module.weight, "quant_state", None)
    if state is None:
        raise NotCovered("its weight is not quantised yet, or without its quant_state")
    if tuple(state.shape) != (layer.out_features, layer.in_features):
        raise NotCovered(f"its weight was quantised as a matrix of {tuple(state.shape)}")
    if not torch.compiler.is_compiling():
        seen = part.parameter("weight").linked("quant_state")
        for name in ("shape", "quant_type", "packing_format_for_cpu", "nested"):
            seen.value(name)
        seen.member("absmax")
        if state.nested:
            seen.member("offset")
            inner = seen.linked("state2")
            inner.member("code"), inner.member("absmax")
    return base_of(layer), True


def _eight_bits(part: Look) -> tuple[Base, bool]:
    if not torch.compiler.is_compiling():
        part.parameter("weight").member("SCB"), part.linked("state").member("SCB")
    # In training the library multiplies x by a dequantised weight, under autocast in autocast's dtype.
    return base_of(part.module), not part.value("training")


def _torchao(part: Look) -> tuple[Base, bool]:
    return base_of(part.live().weight), True


def _quanto(part: Look) -> tuple[Base, bool]:
    layer = part.live()
    if type(layer.weight) in PLAIN_TENSORS:
        raise NotCovered("its weight is quantised anew at each call: freeze it")
    if layer.activation_qtype is not None:
        raise NotCovered("its input is quantised too")
    return base_of(layer.weight), True


def _hqq(part: Look) -> tuple[Base, bool]:
    layer = part.live()
    return base_of(layer), False


_READERS: dict[str, Callable[[Look], tuple[Base, bool]]] = {
    "bitsandbytes.nn.modules.Linear4bit": _four_bits,
    "bitsandbytes.nn.modules.LinearNF4": _four_bits,
    "bitsandbytes.nn.modules.LinearFP4": _four_bits,
    "bitsandbytes.nn.modules.Linear8bitLt": _eight_bits,
    "optimum.quanto.nn.qlinear.QLinear": _quanto,
    "hqq.core.quantize.HQQLinear": _hqq,
}


def reader_of(layer: nn.Module) -> Callable[[Look], tuple[Base, bool]] | None:
    """What reads this base layer, None if it is none of a library that quantises."""
    cls = type(layer)
    if cls is nn.Linear:
        weight = layer._parameters.get("weight")  # a plain attribute of what shards or replicates
        if weight is None or type(weight) in PLAIN_TENSORS:
            return None
        return _torchao if type(weight).__module__.startswith("torchao.") else None
    return _READERS.get(f"{cls.__module__}.{cls.__qualname__}")


def read(part: Look, reader: Callable[[Look], tuple[Base, bool]]) -> Frozen:
    """The weight as a base, and the bias of such a layer, or NotCovered with the reason."""
    part.require(type(part.module), "base_layer")
    if weight_trains(part.module):
        raise NotCovered("the base weight requires grad")
    return _frozen(part, reader)


def now(layer: nn.Module) -> Frozen | None:
    """The same of any layer as it is now, whoever has its forward; None if no library has quantised it."""
    reader = reader_of(layer)
    return None if reader is None else _frozen(Look(layer, Record(attribute, lambda *_: True)), reader)


def reason(layer: nn.Module) -> str | None:
    """Why a layer may compute something else than ``now`` says, or cannot be read, or None."""
    if reader_of(layer) is None:
        return None
    try:
        Look(layer, Record(attribute, lambda *_: True)).require(type(layer), "it")
        now(layer)
    except NotCovered as refused:
        return f"is quantised, but {refused}"
    return None


def weight_trains(layer: nn.Module) -> bool:
    """Whether the weight of such a layer requires a gradient, as quanto's does until somebody freezes it."""
    return any(p.requires_grad for name, p in layer._parameters.items() if p is not None and name != "bias")


def _frozen(part: Look, reader: Callable[[Look], tuple[Base, bool]]) -> Frozen:
    cls = type(part.module)
    if cls.forward.__module__ != next(c for c in cls.__mro__ if "forward" in vars(c)).__module__:
        raise NotCovered(f"the forward of {cls.__module__}.{cls.__qualname__} was replaced")
    layer = part.module
    try:
        base, uncast = reader(part)
        base = base._replace(shape=(part.value("out_features"), part.value("in_features")))
        bias = part.tensor("bias") if "bias" in layer._parameters else part.live().bias
        _check(base, bias)
    except (TypeError, ValueError) as reason:
        raise NotCovered(f"its base layer: {reason}") from None
    # Whatever the dtype of x is: the bias may have the library's compute dtype.
    return Frozen(base, None if bias is None else cast(bias, torch.float32), uncast)


# An entry of the ``__dict__`` of a layer whose products were asked to be computed so (``computed_in``).
COMPUTE = "_peftkern_compute"


def computed(weight: Any, compute: str | None) -> Any:
    """A layer's weight, computed in ``compute``, or NotCovered with the reason. None: the weight as it is."""
    try:
        return weight if compute is None else computed_in(base_of(weight), compute)
    except (TypeError, ValueError) as reason:
        raise NotCovered(f"its base layer: {reason}") from None


def _check(base: Base, bias: Any) -> None:
    N, K = base.shape
    kind_of(base.kind).check(base.tensors, torch.empty(0, device=base.device), K, N)
    if bias is not None and (type(bias) not in PLAIN_TENSORS or bias.shape != (N,)):
        raise ValueError(f"the bias is no plain tensor of {N} elements")

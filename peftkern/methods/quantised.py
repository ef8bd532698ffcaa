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
from ..bases.base import Base, kind_of
from .exact import made_of
from .look import PLAIN_TENSORS, Look, NotCovered


class Frozen(NamedTuple):
    """A base layer. ``uncast``: whether it gives the dtype of its input under autocast too, so that all of it runs outside."""

    weight: Tensor | Base  # (N, K)
    bias: Tensor | None
    uncast: bool = False


def _four_bits(layer: nn.Module) -> tuple[Base, bool]:
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    state = layer.quant_state if state is None else state
    if type(weight).__name__ != "Params4bit" or state is None:
        raise NotCovered("its weight is not quantised yet: move the layer to its device")
    if getattr(state, "packing_format_for_cpu", False):
        raise NotCovered("bitsandbytes has packed its weight for inference, as it does in eval mode without gradients")
    codes = weight.data
    if codes.dtype != torch.uint8:  # quant_storage
        codes = codes.view(torch.uint8)
    scales = (state.absmax,)
    if state.nested:
        scales = state.absmax, state.state2.code, state.state2.absmax, state.offset
    return Base(state.quant_type, (codes, *scales), tuple(state.shape)), True


def _over_127(SCB: Tensor) -> Tensor:
    return SCB / 127.0


def _eight_bits(layer: nn.Module) -> tuple[Base, bool]:
    weight, state = layer.weight, layer.state
    if state.has_fp16_weights:
        raise NotCovered("its weight is kept in half precision (has_fp16_weights)")
    # The next call of the library's own moves what the weight has into the state.
    codes = state.CB if weight.CB is None else weight.CB
    SCB = state.SCB if weight.SCB is None else weight.SCB
    if codes is None or SCB is None:
        raise NotCovered("its weight is not quantised yet: move the layer to its device")
    return Base("int8", (codes, made_of(SCB, _over_127)), tuple(codes.shape)), not layer.training


def _zero(zero_point: Tensor) -> bool:
    return not zero_point.any()


def _torchao(layer: nn.Module) -> tuple[Base, bool]:
    weight = layer.weight
    if type(weight).__name__ != "Int8Tensor":
        raise NotCovered(f"the base weight is torchao's {type(weight).__name__}")
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        raise NotCovered("torchao quantises its input too, and then gives no gradient through the base")
    if list(weight.block_size) != [1, weight.shape[1]]:
        raise NotCovered(f"the base weight has blocks of {list(weight.block_size)}, expected rows")
    if weight.zero_point is not None and not made_of(weight.zero_point, _zero):
        raise NotCovered("the base weight has zero points")
    return Base("int8", (weight.qdata, weight.scale.flatten()), tuple(weight.shape)), True


def _quanto(layer: nn.Module) -> tuple[Base, bool]:
    weight = layer.weight
    if type(weight) in PLAIN_TENSORS:
        raise NotCovered("its weight is quantised at each call: freeze it")
    if type(weight).__name__ != "WeightQBytesTensor" or weight.qtype.name != "qint8" or weight.axis != 0:
        raise NotCovered(f"the base weight is quanto's {type(weight).__name__} of {weight.qtype.name}")
    if layer.activation_qtype is not None:
        raise NotCovered("quanto quantises its input too")
    return Base("int8", (weight._data, weight._scale.flatten()), tuple(weight.shape)), True


def _hqq(layer: nn.Module) -> tuple[Base, bool]:
    if not layer.is_initialized():
        raise NotCovered("its weight is not quantised yet")
    meta = layer.meta
    expected = {"nbits": 4, "axis": 1, "packing": "4bit_u8", "view_as_float": False, "quant_scale": False, "quant_zero": False}
    other = [f"{name} {meta[name]!r}" for name, value in expected.items() if meta[name] != value]
    if other:
        raise NotCovered(f"its weight is HQQ's with {' and '.join(other)}")
    codes = layer.W_q.data
    return Base("hqq4", (codes, meta["scale"], meta["zero"]), tuple(meta["shape"])), False


_READERS: dict[str, Callable[[nn.Module], tuple[Base, bool]]] = {
    "bitsandbytes.nn.modules.Linear4bit": _four_bits,
    "bitsandbytes.nn.modules.LinearNF4": _four_bits,
    "bitsandbytes.nn.modules.LinearFP4": _four_bits,
    "bitsandbytes.nn.modules.Linear8bitLt": _eight_bits,
    "optimum.quanto.nn.qlinear.QLinear": _quanto,
    "hqq.core.quantize.HQQLinear": _hqq,
}


def reader_of(layer: nn.Module) -> Callable[[nn.Module], tuple[Base, bool]] | None:
    """What reads this base layer, None if it is none of a library that quantises."""
    cls = type(layer)
    if cls is nn.Linear:
        return _torchao if type(layer._parameters["weight"]).__module__.startswith("torchao.") else None
    return _READERS.get(f"{cls.__module__}.{cls.__qualname__}")


def read(part: Look, reader: Callable[[nn.Module], tuple[Base, bool]]) -> Frozen:
    """The weight as a base, and the bias of such a layer, or NotCovered with the reason."""
    cls = type(part.module)
    part.require(cls, "base_layer")
    if cls.forward.__module__ != next(c for c in cls.__mro__ if "forward" in vars(c)).__module__:
        raise NotCovered(f"the forward of {cls.__module__}.{cls.__qualname__} was replaced")
    layer = part.live()
    if any(p.requires_grad for name, p in layer._parameters.items() if p is not None and name != "bias"):
        raise NotCovered("the base weight requires grad")
    try:
        base, uncast = reader(layer)
        bias = layer.bias
        _check(base, bias)
    except (TypeError, ValueError) as reason:
        raise NotCovered(f"its base layer: {reason}") from None
    # Whatever the dtype of x is: the bias may have the library's compute dtype.
    return Frozen(base, None if bias is None else cast(bias, torch.float32), uncast)


def _check(base: Base, bias: Any) -> None:
    N, K = base.shape
    kind_of(base.kind).check(base.tensors, torch.empty(0, device=base.device), K, N)
    if bias is not None and (type(bias) not in PLAIN_TENSORS or bias.shape != (N,)):
        raise ValueError(f"the bias is no plain tensor of {N} elements")

"""Attached models under torch.compile: two opaque ops, so that one graph serves any mix of adapters.

What a graph would otherwise hold fast, the request in force and the state of the banks, is looked up when it runs. The
op at the model's entry gives the batch a number; the op of each layer takes it, so that it runs after.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_serial = count(1)
# What graphs name by numbers. Weak: a graph may outlive the model's adapters.
_known: WeakValueDictionary[int, Any] = WeakValueDictionary()


def number_of(thing: Any) -> int:
    """A number for an entry, a layer or a batch, for as long as it lives."""
    number = next(_serial)
    _known[number] = thing
    return number


def _named(number: int):
    thing = _known.get(number)
    if thing is None:
        raise RuntimeError("this graph was compiled for adapters that are detached: call torch.compile again")
    return thing


@torch.library.custom_op("peftkern::attached_entry", mutates_args=())
def attached_entry(
    x: Tensor, entry: int, main: str, others: str, tensors: list[Tensor], names: str, opaque: str
) -> Tensor:
    """The number of the batch that enters a model with the input x; 0 for one adapter, or none, for all rows.

    ``main`` is the name of x; the rest, which may send the call another way, as in ``AttachedEntry.batch_of_graph``.
    """
    batch = _named(entry).batch_of_graph(x, main, others, dict(zip(names.split(), tensors, strict=True)), opaque)
    return torch.tensor(0 if batch is None else batch.number, dtype=torch.int64)


@attached_entry.register_fake
def _(x, entry, main, others, tensors, names, opaque):
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("peftkern::attached_linear", mutates_args=())
def attached_linear(
    x: Tensor, weight: list[Tensor], kind: str, bias: Tensor | None, out_features: int, layer: int, batch: Tensor | None
) -> Tensor:
    """The forward of a layer, its weight a base of this kind, for the batch of this number."""
    number = 0 if batch is None else int(batch)
    return _named(layer).run_op(x, weight, kind, bias, _named(number) if number else None)


@torch.library.custom_op("peftkern::attached_experts", mutates_args=())
def attached_experts(x: Tensor, index: Tensor, weights: Tensor, module: int, batch: Tensor | None) -> Tensor:
    """The forward of a module of experts for the batch of this number, in the dtype of its weights."""
    number = 0 if batch is None else int(batch)
    return _named(module).run(x, index, weights, _named(number) if number else None)


@attached_experts.register_fake
def _(x, index, weights, module, batch):
    return torch.empty_like(x)


@attached_linear.register_fake
def _(x, weight, kind, bias, out_features, layer, batch):
    return x.new_empty((*x.shape[:-1], out_features))

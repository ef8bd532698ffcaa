"""Batches in which every sequence has its own adapter: PEFT's ``adapter_names``, fused, and in training too.

Hooks hand the list of names to every layer (``names.py``). A layer that is covered turns it into ids and runs one
multi_lora_linear; any other of LoRA runs PEFT's own loop over adapters. The layers of a model share the ids tensor,
and with it the route of the batch.
"""

from __future__ import annotations

import contextlib
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import layer as peft_lora
from peft.tuners.road import layer as road
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...autograd.multi_lora_linear import known_multi_lora_linear, multi_lora_linear
from ...autograd.shapes import autocast_dtype
from ...autograd.shapes import uncast as uncasting
from ...many.adapter import Adapter
from ...many.route import route
from ...many.table import AdapterTable, table_of
from ...methods.low_rank.alora import ALORA, acting, invoked
from ...methods.low_rank.lora import LORA
from ...methods.registry import Plan, method_of
from .kept import Kept

_shape = operator.attrgetter("shape")
BASE = "__base__"  # PEFT's name for no adapter


class Batch:
    """The adapter names of a batch, and the ids that layers with some of these adapters give to its sequences.

    Attributes:
        names: one per sequence. adapters: each of them once, in the order in which they come, without the base.
        offsets: where an aLoRA adapter's invocation begins, one per sequence, counted from its end.
    """

    def __init__(self, names: Sequence[str], offsets: Sequence[int | None] | None = None):
        self.names = tuple(names)
        self.offsets = (None,) * len(self.names) if offsets is None else tuple(offsets)
        self.adapters = tuple(dict.fromkeys(n for n in self.names if n != BASE))
        self._ids: dict[tuple, Tensor] = {}

    def tokens(self, names: Sequence[str], of: int) -> list[int]:
        """How many of the last of its tokens each sequence has its adapter on: all, unless it is one of these names."""
        return [
            acting(offset, of) if name in names else of for name, offset in zip(self.names, self.offsets, strict=True)
        ]

    def ids(
        self, adapters: tuple[str, ...], device: torch.device, tokens: Sequence[int] | None = None, of: int = 1
    ) -> Tensor:
        """int32, one per sequence: the position of its adapter in ``adapters``, or -1. With ``tokens``, those of ``of`` that
        have the adapter, one per token if a sequence is divided."""
        key = adapters, device, None if tokens is None else (of, *tokens)
        ids = self._ids.get(key)
        if ids is None:
            position = {name: i for i, name in enumerate(adapters)}
            slots = [position.get(n, -1) for n in self.names]
            divided = False
            if tokens is not None:
                slots = [slot if some else -1 for slot, some in zip(slots, tokens, strict=True)]
                divided = any(0 < some < of for some in tokens)
            # No tensor of an inference_mode block: it has no version, so its route could not be remembered.
            with torch.inference_mode(False):
                ids = torch.tensor(slots, dtype=torch.int32)
                if divided:
                    after = torch.arange(of) >= of - torch.tensor(tokens)[:, None]
                    ids = torch.where(after, ids[:, None], -1).flatten()
                ids = ids.to(device)
            self._ids[key] = ids
        return ids


# id(list) -> the list itself, so that its id is not another's, and its batch. The layers of a call get one list.
_recent: OrderedDict[tuple[int, int], tuple[Any, Any, Batch]] = OrderedDict()
_REMEMBERED = 16


def batch_of(names: Any, offsets: Any = None) -> Batch | None:
    """The batch of this list of names, or of one name for all offsets, and of a list of offsets: the same one as long as the
    lists are the same and hold the same; None if it is something else."""
    given = (names,) * len(offsets) if isinstance(names, str) and offsets is not None else names
    known = None if torch.compiler.is_compiling() else _recent.get((id(names), id(offsets)))
    if known is not None and known[0] is names and known[1] is offsets:
        batch = known[2]
        if batch.names == tuple(given) and (offsets is None or batch.offsets == tuple(offsets)):
            return batch
    if not isinstance(given, (list, tuple)) or not all(isinstance(n, str) for n in given):
        return None
    batch = Batch(given, offsets)
    if not torch.compiler.is_compiling():
        _recent[id(names), id(offsets)] = names, offsets, batch
        while len(_recent) > _REMEMBERED:
            with contextlib.suppress(KeyError):  # another thread was faster
                _recent.popitem(last=False)
    return batch


def _offsets_reason(x: Any, offsets: Any) -> str | None:
    # Why these alora_offsets are not known on the host, or do not fit.
    if offsets is None:
        return None
    if not isinstance(offsets, (list, tuple)) or not all(o is None or type(o) is int for o in offsets):
        return "alora_offsets is not a list of whole numbers"
    shape = tuple(getattr(x, "shape", ()))
    if len(shape) not in (2, 3) or len(offsets) != shape[0]:
        return f"alora_offsets has {len(offsets)} entries, the input has shape {shape}"
    return None


def activated_plan(
    layer: nn.Module, x: Any, offsets: Any, plan_of: Callable[[None], Plan | str]
) -> Plan | tuple[nn.Module, Plan, Batch] | str:
    """What a call with ``alora_offsets=offsets`` and without ``adapter_names`` computes, in the form of ``mixed_plan`` if an
    aLoRA adapter is active."""
    plan = plan_of(None)
    if isinstance(plan, str) or all(h.method is not ALORA for h in plan.held):
        return plan
    if len(plan.held) > 1:
        return "an aLoRA adapter is active beside another"
    reason = _offsets_reason(x, offsets)
    return reason or (layer, plan, batch_of(plan.held[0].name, offsets))


def mixed_plan(
    layer: nn.Module, x: Any, names: Any, plan_of: Callable[[tuple[str, ...]], Plan | str], offsets: Any = None
) -> tuple[nn.Module, Plan, Batch] | str:
    """The layer, and what a call with ``adapter_names=names`` computes, or the reason why PEFT's own code does (or raises).

    ``plan_of``: adapters of the batch -> their plan for this layer and input. ``offsets``: alora_offsets of the call.
    """
    reason = _offsets_reason(x, offsets)
    if reason is not None:
        return reason
    batch = batch_of(names, offsets)
    if batch is None:
        return "adapter_names is not a list of names"
    plan = plan_of(batch.adapters)
    if isinstance(plan, str):
        return plan
    if x.dim() < 2 or x.shape[0] != len(batch.names):
        return _other_number(batch, x)
    for h in plan.held:
        if not h.method.mixed or h.folds:
            return f"a batch with adapter_names is not covered for {h.method.name}"
        if h.dropout_p > 0.0 and "g_b" in h.method.coefficients:
            return f"{h.method.name} with dropout trains on another base product than its batch"
    return layer, plan, batch


# Layer -> what its adapters looked like, and their table: made again as soon as one of them is another. Entries go with
# their layers.
_tables: WeakKeyDictionary[nn.Module, tuple[list, AdapterTable]] = WeakKeyDictionary()


def _table(layer: nn.Module, plan: Plan, x: Tensor) -> AdapterTable | list[Adapter]:
    # The guard has just seen all weights of this call; checking them again for a table costs as much as it did.
    # The same Parameter may hold other data by now: dtype, device and rank say whether the table still fits it.
    key: list[Any] = [x.dtype, x.device]
    plain = not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type)
    for h in plan.held:
        # The table of whole matrices shows what they hold. What is made of an adapter's tensors would be of one moment.
        plain = plain and h.method.alone is not None and type(h.numbers[0]) is float and h.tensors[2] is None
        if not plain:
            return [h.adapter(plan.weight, plan.bias) for h in plan.held]
        A, B, _ = h.tensors
        key += id(A), id(B), A.shape, A.dtype, h.numbers[0]
    known = _tables.get(layer)
    if known is not None and known[0] == key:
        return known[1]
    table = table_of([h.adapter(plan.weight, plan.bias) for h in plan.held], x, x.dtype)
    # A table of copies would miss what training does to the originals.
    if all(t is w for t, w in zip(table.weights, (w for h in plan.held for w in h.tensors[:2]), strict=True)):
        _tables[layer] = key, table
    return table


def run_mixed(layer: nn.Module, plan: Plan, batch: Batch, x: Tensor) -> Tensor:
    """y of the layer for the mixed batch: one fused call, whatever the number of adapters and their methods."""
    weight, bias, held, _, uncast = plan
    if uncast and autocast_dtype(x) is not None:
        with uncasting(x):
            return run_mixed(layer, plan._replace(uncast=False), batch, x)
    names, drops, activated = [], [], []
    dropping = False
    for h in held:  # loops rather than expressions: a frame each is what a small layer's time goes into
        names.append(h.name)
        drops.append(h.dropout_p)
        dropping = dropping or h.dropout_p > 0.0
        if h.method is ALORA:
            activated.append(h.name)
    if activated:
        of = x.shape[1] if x.dim() == 3 else 1
        tokens = batch.tokens(activated, of)
        without, plan = plan, plan._replace(held=[invoked(h) if h.method is ALORA else h for h in held])
        if set(batch.names) == set(names) and len(held) == 1 and not any(0 < n < of for n in tokens):
            if all(tokens):
                return plan.run(x)
            if not any(tokens):
                return without.run(x)
        ids = batch.ids(tuple(names), x.device, tokens, of)
    else:
        ids = batch.ids(tuple(names), x.device)
    adapters = _table(layer, plan, x)
    y = multi_lora_linear(x, weight, adapters, ids, bias=bias, dropout_p=drops, training=dropping)
    return y.to(x.dtype) if held[0].method.keeps_dtype else y


class Again:
    """A call of ``run_mixed`` that the layer's next one can take over: its table, for as long as the kept plan holds and the
    adapters' matrices are the same, and the route of its batch."""

    def __init__(self, kept: Kept, plan: Plan, table: AdapterTable):
        self.table, self.weights = table, operator.itemgetter(*(i for slots in kept.places() for i in slots[:2]))
        self.names = tuple(h.name for h in plan.held)
        self.ids, self.shapes = list(map(id, table.weights)), list(map(_shape, table.weights))
        self._route: tuple[Batch | None, int, Tensor | None, Tensor | None] = None, 0, None, None

    def route(self, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """(order, starts) of x's rows."""
        known, rows, order, starts = self._route
        now = x.shape[:-1].numel()
        if known is not batch or rows != now:
            order, starts = route(batch.ids(self.names, x.device), x, self.table)
            self._route = batch, now, order, starts
        return order, starts


def note_again(layer: nn.Module, kept: Kept, plan: Plan, x: Tensor) -> None:
    """Keep what ``run_again`` can take over of a call with this kept plan, which has just run."""
    if all(h.dropout_p == 0.0 and h.method is not ALORA for h in plan.held):
        table = _table(layer, plan, x)
        known = _tables.get(layer)
        if known is not None and known[1] is table:
            kept.again = Again(kept, plan, table)


def run_again(layer: nn.Module, kept: Kept, x: Any, arguments: dict[str, Any]) -> Tensor | None:
    """y of a call with ``adapter_names`` and no other arguments, if it is as the one before it but for the values; else None.

    Raises TypeError and ValueError, before anything is computed, for what a kept plan does not look at: shapes, devices."""
    again, names = kept.again, arguments.get("adapter_names") if len(arguments) == 1 else None
    now = None if again is None or names is None else kept.seen(layer, x)
    batch = None if now is None else batch_of(names)
    if batch is None or batch.adapters != kept.mixed or x.dim() < 2 or x.shape[0] != len(batch.names):
        return None
    weights = again.weights(now)
    if list(map(id, weights)) != again.ids or list(map(_shape, weights)) != again.shapes:
        kept.again = None
        return None
    weight, bias = kept.base(now)
    return known_multi_lora_linear(x, weight, again.table, *again.route(batch, x), bias)


_TAKE_NAMES = (peft_lora.Embedding, peft_lora.Conv1d, peft_lora.Conv2d, peft_lora.Conv3d, road.Linear)


def takes_names(layer: nn.Module) -> bool:
    """Whether the library's own code may run a batch with names: of PEFT's layers those of LoRA and RoAd on the base itself."""
    return not isinstance(layer, BaseTunerLayer) or (
        (type(layer) in _TAKE_NAMES or method_of(type(layer)) is LORA)
        and not isinstance(layer.base_layer, BaseTunerLayer)
    )


def _other_number(batch: Batch, x: Tensor) -> str:
    return f"adapter_names has {len(batch.names)} entries, the input has shape {tuple(x.shape)}"


def run_apart(layer: nn.Module, x: Tensor, names: Any, stock: Callable[..., Tensor], reason: str) -> Tensor:
    """y of a layer that does not take names by itself, in a call that is not fused for this reason: the base layer's, if
    none of the adapters acts. ``stock``: PEFT's own forward.

    Raises:
        ValueError: it is more than that.
    """
    nested = isinstance(layer.base_layer, BaseTunerLayer)
    if layer._disable_adapters and not nested:
        return stock(layer, x)
    batch, held_by = batch_of(names), getattr(layer, method_of(type(layer)).adapters)
    if batch is not None and len(batch.names) != len(x):
        reason = _other_number(batch, x)
    elif batch is not None:
        acting = layer.merged_adapters or any(name in held_by for name in batch.adapters)
        if layer._disable_adapters or not acting:
            y = layer.base_layer(x, **({"adapter_names": names} if nested else {}))
            return y.to(x.dtype) if method_of(type(layer)).keeps_dtype else y
    raise ValueError(f"Cannot pass `adapter_names`: {reason}")

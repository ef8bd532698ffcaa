"""The route of a batch, made once per tensor of ids: the layers of a model and the steps of a decoder share it."""

from __future__ import annotations

import weakref
from collections.abc import Hashable

import torch
from torch import Tensor

from ..dispatch.registry import caller
from .table import AdapterTable

_route = caller("multi_lora_linear_route")
# id(adapter_ids) -> (weak reference to it, what it held, slots, leading shape of x, order, starts). A dictionary with tensors
# as weak keys does the same in Python, for a fifth of the time of a small call.
_known: dict[int, tuple[weakref.ref, _Held, Hashable, torch.Size, Tensor, Tensor]] = {}


class _Held:
    """What a tensor of ids holds now. On CPU its values, as numpy, ``.data`` and other processes write without a new version;
    elsewhere reading them would make the host wait: its version and place."""

    __slots__ = ("_values", "_version")

    def __init__(self, ids: Tensor):
        self._version = ids._version, ids.data_ptr()
        self._values = ids.clone() if ids.is_cpu else None

    def ids(self, given: Tensor) -> Tensor:
        """The ids themselves, which nobody changes meanwhile where they are a copy."""
        return given if self._values is None else self._values

    def by(self, ids: Tensor) -> bool:
        """Whether ``ids``, the same tensor, still holds it."""
        if self._values is not None and ids.is_cpu:
            return torch.equal(ids, self._values)
        return self._version == (ids._version, ids.data_ptr())


def route(adapter_ids, x: Tensor, state: AdapterTable) -> tuple[Tensor, Tensor]:
    """(order, starts) of ``adapter_ids`` for the rows of x.

    Made again if the ids have changed (on a GPU: in a way that torch counts), the slots answer to other ids, or x has
    another leading shape. Raises TypeError and ValueError for ids that do not fit x, and on CPU for one that no adapter has.
    """
    if not isinstance(adapter_ids, Tensor):
        raise TypeError(f"adapter_ids must be a tensor, got {type(adapter_ids).__name__}")
    if adapter_ids.device != x.device:
        raise ValueError(f"adapter_ids is on {adapter_ids.device}, expected {x.device} like x")
    shape = x.shape[:-1]
    # A graph that is being recorded makes its own: a known one would be a constant of it.
    recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if recorded or type(adapter_ids) is not Tensor or adapter_ids.is_inference():
        return _route(_per_row(adapter_ids, shape), state.table, state.mask)
    known = _known.get(id(adapter_ids))
    if known is not None:
        ref, held, slots, known_shape, order, starts = known
        if ref() is adapter_ids and known_shape == shape and slots == state.slots and held.by(adapter_ids):
            return order, starts
    with torch.inference_mode(False):  # training may meet these ids next, and saves the route
        held = _Held(adapter_ids)
        order, starts = _route(_per_row(held.ids(adapter_ids), shape), state.table, state.mask)
    key = id(adapter_ids)
    ref = weakref.ref(adapter_ids, lambda _: _known.pop(key, None))
    _known[key] = ref, held, state.slots, shape, order, starts
    return order, starts


def _per_row(adapter_ids: Tensor, shape: torch.Size) -> Tensor:
    rows = shape.numel()
    if adapter_ids.shape in (shape, (rows,)):
        return adapter_ids.reshape(rows)
    if adapter_ids.shape == shape[:1]:
        return adapter_ids.repeat_interleave(rows // max(shape[0], 1))
    raise ValueError(
        f"adapter_ids has shape {tuple(adapter_ids.shape)}, expected one id per row ({rows}) or per leading index"
        f" ({tuple(shape[:1])})"
    )

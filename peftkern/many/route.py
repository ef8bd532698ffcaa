"""The route of a batch, made once per tensor of ids: the layers of a model and the steps of a decoder share it."""

from __future__ import annotations

import weakref
from collections.abc import Hashable

import torch
from torch import Tensor

from ..dispatch.registry import caller
from .table import AdapterTable

_route = caller("multi_lora_linear_route")
# id(adapter_ids) -> (weak reference to it, version, slots, rows, order, starts). A dictionary with tensors as weak keys
# does the same in Python, for a fifth of the time of a small call.
_known: dict[int, tuple[weakref.ref, int, Hashable, int, Tensor, Tensor]] = {}


def route(adapter_ids, x: Tensor, state: AdapterTable) -> tuple[Tensor, Tensor]:
    """(order, starts) of ``adapter_ids`` for the rows of x.

    Made again if the ids were changed in place, the slots answer to other ids, or x has another number of rows.
    Raises TypeError and ValueError for ids that do not fit x, and on CPU for one that no adapter has.
    """
    if not isinstance(adapter_ids, Tensor):
        raise TypeError(f"adapter_ids must be a tensor, got {type(adapter_ids).__name__}")
    if adapter_ids.device != x.device:
        raise ValueError(f"adapter_ids is on {adapter_ids.device}, expected {x.device} like x")
    rows = x.shape[0] if x.dim() == 2 else x.shape[:-1].numel()
    # A graph that is being recorded makes its own: a known one would be a constant of it.
    recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    keeps = not recorded and not adapter_ids.is_inference()
    known = _known.get(id(adapter_ids)) if keeps else None
    if known is not None:
        ref, version, slots, known_rows, order, starts = known
        if ref() is adapter_ids and version == adapter_ids._version and known_rows == rows and slots == state.slots:
            return order, starts
    if not keeps:
        return _route(_per_row(adapter_ids, x, rows), state.table, state.mask)
    with torch.inference_mode(False):  # training may meet these ids next, and saves the route
        order, starts = _route(_per_row(adapter_ids, x, rows), state.table, state.mask)
    key = id(adapter_ids)
    ref = weakref.ref(adapter_ids, lambda _: _known.pop(key, None))
    _known[key] = ref, adapter_ids._version, state.slots, rows, order, starts
    return order, starts


def _per_row(adapter_ids: Tensor, x: Tensor, rows: int) -> Tensor:
    if adapter_ids.numel() == rows:
        return adapter_ids.reshape(rows)
    if adapter_ids.shape == x.shape[:1]:
        return adapter_ids.repeat_interleave(rows // max(x.shape[0], 1))
    raise ValueError(
        f"adapter_ids has shape {tuple(adapter_ids.shape)}, expected one id per row ({rows}) or per leading index"
        f" ({tuple(x.shape[:1])})"
    )

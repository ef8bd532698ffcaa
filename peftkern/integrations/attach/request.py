"""The adapters of a batch, and which batch is in force in the calling context.

A request is what ``use`` names. It is found through a context variable: each thread and task has its own, a thread that
is started inside of a block has none, a task or a copied context has that of the moment it was made. A request that has
ended is never served again: a context that still shows it raises.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .rows import Layout, Rows, RowTrace, layout_of


class Layer(Protocol):
    """What a request asks of a layer with attached adapters."""

    slots: Hashable  # equal for layers in which ids mean the same adapters


class Entry:
    """An adapter of a model: its id in every layer that it changes.

    ``number``: no two entries of a model ever share one. ``users`` requests run with it; once it was removed, the last of
    them frees it. ``shared``: tensors that others may have too, which are known as long as one of them is there.
    """

    def __init__(self, name: str, number: int):
        self.number, self.key = number, f"{name}#{number}"  # the key is its name in banks
        self.ids: dict[Layer, int] = {}
        self.shared: list[Tensor] = []
        self.users = 0
        self.freed = False


class Each(NamedTuple):
    """What the names of a request are to one layer: its ids (-1: none), whether any is there, and if they differ."""

    ids: tuple[int, ...]
    any: bool
    differ: bool


class Request:
    """The adapters of one batch. They stay as they are until the request ends, whatever is added or removed.

    Attributes:
        names: one per sequence, or one for all. repeats: rows of each name in a run. expanded: further rows of each of
            those, within ``generate``; the model is called with and without them.
    """

    def __init__(
        self, owner: Any, names: tuple[str | None, ...], entries: dict[str, Entry], repeats: int = 1, expanded: int = 1
    ):
        self.owner, self.names, self.entries = owner, names, entries
        self.repeats, self.expanded = repeats, expanded
        self.uniform = len(set(names)) == 1
        self.ended = False
        self.last: Batch | None = None
        self.batches: dict[tuple, Batch] = {}  # of compiled calls
        self._each: dict[Layer, Each] = {}
        self._ids: dict[tuple, Tensor] = {}

    def within_generate(self, copies: int) -> Request:
        """The same request where the model's generate makes ``copies`` rows of each."""
        return Request(self.owner, self.names, self.entries, self.repeats, copies)

    def copies(self, rows: int) -> int:
        """Rows of each name in a batch of so many, or 0 if that is not known."""
        for copies in (self.repeats, self.repeats * self.expanded):
            if rows == copies * len(self.names):
                return copies
        return 0

    def each(self, layer: Layer) -> Each:
        """The id of each name in the layer."""
        each = self._each.get(layer)
        if each is None:
            ids = tuple(-1 if name is None else self.entries[name].ids.get(layer, -1) for name in self.names)
            each = self._each[layer] = Each(ids, max(ids, default=-1) >= 0, len(set(ids)) > 1)
        return each

    def ids(self, layer: Layer, shape: torch.Size, device: torch.device, rows: Rows, copies: int) -> Tensor:
        """int32: one id per leading index of an input of this shape, or per row if its batch lies elsewhere.

        ``copies`` = 0: one adapter for all rows. Layers whose slots agree share the tensor: it carries the route.
        """
        each = self.each(layer).ids
        lead = shape[:1] if rows.axis == 0 else shape[:-1]
        key = each, lead, rows, copies, device, layer.slots
        ids = self._ids.get(key)
        if ids is None:
            with torch.inference_mode(False):
                if copies:
                    ids = torch.tensor([i for i in each for _ in range(copies)], dtype=torch.int32)
                    ids = ids.repeat_interleave(rows.inner).repeat(lead[rows.axis] // (len(ids) * rows.inner))
                    ids = ids.view(-1, *[1] * (len(lead) - rows.axis - 1)).expand(lead).reshape(-1).to(device)
                else:
                    ids = torch.full(lead, each[0], dtype=torch.int32, device=device)
            self._ids[key] = ids
        return ids


class Batch:
    """One call of the model with several adapters: rows of each name, and where the layers find them.

    Attributes:
        trace: follows the rows through this call, or None if an earlier call of the same kind was followed.
        layouts: what that one found, or this one finds, layer by layer. settled: whether later calls may rely on it.
            lost: whether this call went another way through the model than the one that was followed.
        number: by which a compiled call knows it.
    """

    def __init__(self, request: Request, copies: int, layouts: dict[Layer, Layout]):
        self.request, self.copies, self.layouts = request, copies, layouts
        self.trace = None if layouts else RowTrace(self.rows)
        self.settled, self.lost, self.number = True, False, 0
        self.parent = _batch.get()

    @property
    def rows(self) -> int:
        """Rows at the model's entry."""
        return self.copies * len(self.request.names)

    def rows_of(self, layer: Layer, x: Tensor) -> Rows | None:
        """Whose rows a layer's input holds, or None if that is not known."""
        if self.trace is None:
            layout = self.layouts.get(layer)
            rows = layout and layout.rows(x.shape, self.rows)
            if rows is None:
                self.lost = True
                remembered = self.request.owner.layouts
                for kind in [kind for kind, layouts in list(remembered.items()) if layouts is self.layouts]:
                    remembered.pop(kind, None)  # the next call of this kind is followed again
            return rows
        rows = self.trace.place(x)
        if not isinstance(rows, Rows) or rows.axis == x.dim() - 1:
            return None
        layout = layout_of(rows, x.shape, self.rows)
        self.settled &= layout is not None and self.layouts.setdefault(layer, layout) == layout
        return rows


# Each one variable for all models: variables made at run time would never be freed. The innermost is the last.
_requests: ContextVar[tuple[Request, ...]] = ContextVar("peftkern_requests", default=())
_batch: ContextVar[Batch | None] = ContextVar("peftkern_batch", default=None)


def current_request(owner: Any) -> Request | None:
    """The request in force for a model. RuntimeError if it has ended: this context was copied from another one."""
    for request in reversed(_requests.get()):
        if request.owner is owner:
            if request.ended:
                raise RuntimeError(
                    "the use() block that this context was made in has ended: call use() here, or run what bind()"
                    " returns, which enters and leaves at every call"
                )
            return request
    return None


def batch_of(request: Request) -> Batch | None:
    """The call of the model that this context is in, or that is computed again for its backward pass."""
    batch = _batch.get()
    while batch is not None and batch.request is not request:
        batch = batch.parent
    return request.last if batch is None and torch._C._current_graph_task_id() != -1 else batch


@contextlib.contextmanager
def in_force(request: Request) -> Iterator[None]:
    """Within the block, calls of the request's model in this context take its adapters."""
    _requests.set((*_requests.get(), request))
    try:
        yield
    finally:
        request.ended = True
        # By itself, wherever it lies: blocks may be left in another order, and in another context.
        _requests.set(tuple(r for r in _requests.get() if r is not request))


@contextlib.contextmanager
def bound(batch: Batch) -> Iterator[None]:
    """Within the block, layers find this batch."""
    token = _batch.set(batch)
    batch.request.last = batch
    try:
        yield
    finally:
        _batch.reset(token)
        batch.trace = None  # what is recomputed for backward goes by what was found


def refuse_generators() -> None:
    """RuntimeError if the block that the caller of the caller enters lies in a generator.

    A generator runs in the context of whoever asks for its next value: it would leave its adapter to its caller while it
    rests, and go on without it where a server runs each step in a context of its own. One that makes a context manager
    (contextlib) is entered and left by the block that uses it, so that block counts.
    """
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename in (contextlib.__file__, __file__):
            frame = frame.f_back
        elif frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
            frame = frame.f_back
            if frame is None or frame.f_code.co_filename != contextlib.__file__:
                raise RuntimeError(
                    "use() inside a generator would hold in its caller while the generator rests, and be lost where each"
                    " step runs in another context: run what bind(names) returns, or enter use() around the generator"
                )
        else:
            return

"""Whose rows a tensor holds: the batch axis of a model's input, followed through the operations of one call.

A layer deep in a model sees rows, not sequences, and a shape does not say which row is whose: (4, 4, K) may be four
sequences of four tokens or the other way round, (8, K) any order of eight tokens. So a call of the model is watched by
a dispatch mode, and each operation carries the place of the batch from its inputs to its outputs
(``row_rules``). Sizes, equal by accident or not, decide nothing. An operation without a rule makes its result
UNKNOWN.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .row_rules import RULES, UNKNOWN, Call, Place, Rows, nothing_known, pointwise, tensors_of

__all__ = ["UNKNOWN", "Layout", "Place", "RowTrace", "Rows", "layout_of"]


class Layout(NamedTuple):
    """A place without its sizes: what later calls of other sizes share.

    ``major``: each sequence has its indices of the axis in a row. ``minor``: the axis goes round the batch. Neither: it
    is the batch.
    """

    dim: int
    axis: int
    major: bool
    minor: bool

    def rows(self, shape: torch.Size, batch: int) -> Rows | None:
        """The place in a tensor of this shape, or None if it does not fit."""
        if len(shape) != self.dim or shape[self.axis] % batch:
            return None
        runs = shape[self.axis] // batch
        if runs != 1 and not self.major and not self.minor:
            return None
        return Rows(self.axis, runs if self.major else 1)


def layout_of(place: Place, shape: torch.Size, batch: int) -> Layout | None:
    """The layout of a layer's input, or None if rows (all but its last axis) cannot be told apart by it."""
    if not isinstance(place, Rows) or place.axis == len(shape) - 1:
        return None
    major, minor = place.inner != 1, shape[place.axis] != place.inner * batch
    return None if major and minor else Layout(len(shape), place.axis, major, minor)


class RowTrace(TorchDispatchMode):
    """Watches the operations of its block; ``place(t)`` says where the ``batch`` (>= 2) sequences lie in t."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        # storage -> a weak reference, which keeps its number from being given to another one, and places of its views.
        self._known: dict[int, tuple[StorageWeakRef, dict[tuple, Place]]] = {}
        self._counted: dict[int, StorageWeakRef] = {}  # of what arange made in this call
        self._computed: dict[int, StorageWeakRef] = {}  # of what was computed from what layers gave
        self.decided = False  # whether values of that were read, and may have chosen the way

    def place(self, t: Tensor) -> Place:
        """Rows, UNKNOWN, or None for a tensor of no sequence."""
        storage = _storage(t)
        if storage is None:
            return UNKNOWN
        known = self._known.get(storage._cdata)
        if known is None:
            return None
        places, geometry = known[1], _geometry(t)
        if geometry not in places:  # a view that no rule has seen, of memory that holds sequences
            places[geometry] = _beside(places, geometry)
        return places[geometry]

    def counted(self, t: Tensor) -> bool:
        """Whether t is torch.arange of this call, and so the same in each one of its kind: no choice made from data."""
        storage = _storage(t)
        return storage is not None and storage._cdata in self._counted

    def mark(self, t: Tensor, place: Place) -> None:
        """Say where the batch lies in t."""
        storage = _storage(t)
        if storage is None:
            return
        known = self._known.get(storage._cdata)
        if known is None:
            if place is None:
                return
            known = self._known[storage._cdata] = StorageWeakRef(storage), {}
        known[1][_geometry(t)] = place

    def computed(self, *tensors: Tensor) -> None:
        """Say that these depend on what a layer with adapters gave."""
        for t in tensors:
            storage = _storage(t)
            if storage is not None and storage._cdata not in self._computed:
                self._computed[storage._cdata] = StorageWeakRef(storage)

    def _is_computed(self, t: Tensor) -> bool:
        storage = _storage(t)
        return storage is None or storage._cdata in self._computed

    def _fits(self, place: Place, t: Tensor, first: Tensor) -> bool:
        if not isinstance(place, Rows):
            return True
        return t.dim() == first.dim() and t.shape[place.axis] % (place.inner * self.batch) == 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and _composite(func):
            with self:  # what autograd's dispatch takes apart before it comes here
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        results = tensors_of(out)
        call = Call(_named(func._schema, args, kwargs), out, self.place, self.counted, self.batch)
        if func._schema.name == "aten::arange":
            self._counted[out.untyped_storage()._cdata] = StorageWeakRef(out.untyped_storage())
        written = [t for a in func._schema.arguments if _writes(a) for t in tensors_of(call.arguments.get(a.name))]
        if self._computed and any(self._is_computed(t) for t in call.tensors):
            self.decided |= func._schema.name in _READS
            self.computed(*results, *written)
        if torch.Tag.inplace_view in func.tags:
            return out  # its new shape is another view of its memory
        if (not results and not written) or all(self.place(t) is None for t in call.tensors):
            return out
        place = nothing_known(call)
        if results:
            rule = _rule(func)
            with contextlib.suppress(KeyError, IndexError, ZeroDivisionError):  # a form that the rule does not know
                place = rule(call)
        before = [self.place(t) for t in written]
        for t in results:
            # A rule speaks of the first result; others (parts, indices, statistics) have the same axes or are unknown.
            self.mark(t, place if self._fits(place, t, results[0]) else UNKNOWN)
        for t in written:
            if not any(t is r for r in results):
                self.mark(t, place if results else UNKNOWN)
        for t, was in zip(written, before, strict=True):
            self._overwritten(
                t, was, func._schema.name == "aten::copy_" and self.place(call.arguments["src"]) is not None
            )
        return out

    def _overwritten(self, t: Tensor, was: Place, moved: bool) -> None:
        # Other views of the memory that t was written to: all of a smaller one, some sequences of the whole.
        if was == self.place(t) and not (moved and was is UNKNOWN):
            return
        known = self._known.get(t.untyped_storage()._cdata)
        places = known[1] if known else {}
        for geometry, place in places.items():
            if (
                isinstance(place, Rows)
                and geometry != _geometry(t)
                and (was is UNKNOWN or geometry[1].numel() <= t.numel())
            ):
                places[geometry] = UNKNOWN


def _storage(t: Tensor):
    if t.is_nested:
        return None
    try:
        return t.untyped_storage()
    except (RuntimeError, NotImplementedError):  # sparse and wrapper tensors have none
        return None


def _geometry(t: Tensor) -> tuple:
    return t.storage_offset(), t.shape, t.stride()


def _beside(places: dict[tuple, Place], geometry: tuple) -> Place:
    """The place of a tensor in memory that was written through other views of it, such as ``x[:, 1:] = y``."""
    found = set()
    for (offset, shape, strides), place in places.items():
        if isinstance(place, Rows):
            step, size = strides[place.axis], shape[place.axis]
            if _tells(offset, shape, strides, step, size) is None:
                return UNKNOWN
            axes = [d for d, n in enumerate(geometry[1]) if (n, geometry[2][d]) == (size, step)]
            if len(axes) != 1 or _tells(*geometry, step, size) != _tells(offset, shape, strides, step, size):
                return UNKNOWN
            found.add(Rows(axes[0], place.inner))
    return found.pop() if len(found) == 1 else UNKNOWN


def _tells(offset: int, shape: torch.Size, strides: tuple, step: int, size: int) -> int | None:
    """The first index of an axis of this size and step, if an element's address tells its index; else None."""
    if not step:
        return None
    rest = [(n, s) for n, s in zip(shape, strides, strict=True) if n > 1 and (n, s) != (size, step)]
    below = offset % step + sum((n - 1) * s for n, s in rest if s < step)
    if below >= step or any(s >= step and s % (size * step) for _, s in rest):
        return None
    return offset // step % size


@functools.cache
def _composite(func) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


# What brings values of tensors to Python.
_READS = ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero")


def _named(schema, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [a.name for a in schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _writes(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _rule(func):
    if not func._schema.name.startswith("aten::"):
        return RULES.get(func._schema.name, nothing_known)
    name = func._schema.name.removeprefix("aten::")
    rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
    # max, min, all and any reduce in some overloads, and are elementwise in others.
    if rule is None or "other" in [a.name for a in func._schema.arguments]:
        functional = getattr(torch.ops.aten, name.removesuffix("_"), None)
        overloads = functional.overloads() if functional is not None else []
        if torch.Tag.pointwise in func.tags or any(
            torch.Tag.pointwise in getattr(functional, o).tags for o in overloads
        ):
            return pointwise
    return rule or nothing_known

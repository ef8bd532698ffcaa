"""Serving many adapters on one transformers model, a batch at a time, whatever its mix of methods.

``attach_adapters`` reads PEFT checkpoints into one AdapterBank per layer. The model keeps its modules, parameters and
state dict; outside of ``use`` it is the base model. PEFT itself is not needed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from os import PathLike
from typing import NoReturn

import torch
from torch import nn

from ...checks import accumulate_dtype
from ...many.bank import AdapterBank
from ...many.pool import Pool
from ..experts.attached import AttachedExperts, takes
from .checkpoint import Checkpoint
from .entry import AttachedEntry, AttachedGenerate, entries_above
from .fit import Fitted, fit
from .layer import Attached, AttachedLinear, Replacement, device_of, dtype_of, features
from .reach import Edge, check_in_place, edges
from .request import Entry, Request, in_force
from .use import BoundModel, Use, checked_repeats, named
from .weights import refuse

__all__ = ["MultiLoRA", "attach_adapters"]

_MAX_ADAPTERS, _MAX_RANK = 256, 64


def attach_adapters(
    model: nn.Module,
    adapters: Mapping[str, str | PathLike],
    *,
    max_adapters: int | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype | None = None,
    outside: str = "base",
) -> MultiLoRA:
    """Attach PEFT checkpoints to a plain transformers model, all of them ready to be mixed in one batch.

    A layer computes the equation of ``multi_lora_linear`` with the coefficients of the adapter of the sequence that x
    belongs to. Covered are LoRA and rsLoRA (``rank_pattern``, ``alpha_pattern``, ``lora_bias``), DoRA, AdaLoRA, VeRA and
    (IA)^3, on ``torch.nn.Linear``, transformers' ``Conv1D`` and the layers that bitsandbytes, torchao, quanto and HQQ
    have quantised (read anew at each call; other kinds are refused with the reason), and on CPU LoRA on the weights of
    transformers' experts (``target_parameters``), where each token takes its own adapter; the adapters may differ in
    method, in ranks and in the layers that they change. A setting that could mean another function is refused by name,
    whatever else a config notes is ignored, as PEFT ignores it. Modules that an adapter saves whole (``modules_to_save``)
    must be the model's own.

    What is computed from the layer's own weight and bias (DoRA's scale m / norm, the scaled bias of (IA)^3, the sum of the
    layer's bias and ``lora_bias``) is computed once, when the adapter is added: after a change of the model's weights,
    remove the adapter and add it again. Gradients of such a weight or bias are refused in the backward pass.

    A layer's bank holds R * (K + N) elements of an adapter with matrices in ``dtype`` and its vectors in fp32. VeRA's
    matrices, which its adapters share, it holds once for all adapters that bring the same ones (found by their contents),
    in ``dtype`` and cut to the layer's size: each further one costs R + N fp32 numbers a layer. Besides, a VeRA checkpoint's
    whole matrices are kept once a model and device, in fp32. A checkpoint without them (``save_projection=False``) gets
    those that PEFT draws from ``projection_prng_key``.

    Args:
        model: on the device where it will run. Its parameters and state dict stay as they are; accelerate's hooks go on
            working.
        adapters: name -> folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``, read as
            tensors only), or with diffusers' ``pytorch_lora_weights``, of which the model takes its own part. Names
            of layers may be those of an earlier transformers, and tensors may be stored in 8 bits (fp8).
        max_adapters: how many there may be at a time (default: 256, or twice as many as are given).
        max_rank: the largest rank that may be added (default: 64, or the largest that is given).
        dtype: in which the adapters are kept: the layer's, or fp32 (default: the layer's if the adapters given are
            stored in it, else fp32; fp32 where the layer's weight is in codes).
        outside: what a call outside of ``use`` does: "base" runs the base model, "error" raises RuntimeError, so that no
            request of a server is answered without its adapter by accident. A deep copy or pickle of the model has nothing
            attached: it is the base model, without an error.

    Raises:
        ValueError: a checkpoint that does not fit the model (missing or corrupt file, other shapes, unknown keys,
            another method), with file and key. Then the model is as it was.
        TypeError: an argument of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters must map names to folders, got {type(adapters).__name__}")
    if outside not in ("base", "error"):
        raise ValueError(f"outside is {outside!r}, expected 'base' or 'error'")
    if max_adapters is None:
        max_adapters = max(_MAX_ADAPTERS, 2 * len(adapters))
    multi = MultiLoRA(model, max_adapters, max_rank, dtype, outside)
    multi._add_all(adapters)
    return multi


class MultiLoRA:
    """The adapters attached to a model. Made by ``attach_adapters``; safe to use from several threads.

    Attributes:
        model: the model.
    """

    def __init__(
        self,
        model: nn.Module,
        max_adapters: int,
        max_rank: int | None,
        dtype: torch.dtype | None,
        outside: str = "base",
    ):
        self.model, self.outside = model, outside
        self.layouts: dict[tuple, dict] = {}  # kind of call -> where its layers find the batch
        self.graph_batch: torch.Tensor | None = None  # while torch.compile traces a call
        self._max_adapters, self._max_rank, self._dtype = max_adapters, max_rank, dtype
        self._entries: dict[str, Entry] = {}
        self._leaving: set[Entry] = set()
        self._attached: dict[nn.Module, Attached] = {}
        self._edges: list[Edge] = []  # the way to each of them
        self._replaced: dict[str, Replacement] = {}  # the model's own methods, where batches come in
        self._serial, self._pool = count(), Pool()
        # One change at a time; what use() looks at is changed under the second lock, and only for a moment.
        self._changing, self._lock = threading.RLock(), threading.RLock()

    def __reduce__(self) -> NoReturn:
        """TypeError: it belongs to hooks of this very model, which neither a copy nor a pickle has."""
        raise TypeError(
            "a MultiLoRA belongs to the model that it is attached to, and has no copy or pickle: copy the model, which is "
            "plain again, and call attach_adapters on that"
        )

    def add(self, name: str, folder: str | PathLike) -> None:
        """Attach one more checkpoint, at any time. All of it or, after an error, nothing.

        Raises:
            ValueError: a name that is there, or a checkpoint that does not fit (see ``attach_adapters``).
            RuntimeError: there are ``max_adapters`` already.
        """
        self._add_all({name: folder})

    def remove(self, name: str) -> None:
        """Take an adapter out. Requests that run keep it until they end; new ones do not find it.

        Raises KeyError for an unknown name.
        """
        with self._lock:
            entry = self._find(name)
            del self._entries[name]
            self._leaving.add(entry)
        self._free_unused([entry])

    def use(self, names: str | Sequence[str | None] | None, repeats: int | None = None) -> Use:
        """A ``with`` block in which calls of the model take these adapters.

        Args:
            names: one name per sequence of the batch (None: the base model), in the order of the model's input; or one
                for all. One name, or the same one everywhere, fits any batch. Several need a batch of their number.
            repeats: each name stands for so many rows in a run (default: one). Within ``generate`` that is known: beams,
                and several sequences per prompt, come as such runs.

        The batch is counted where it enters the model, along the first axis of its main input, and its rows are followed
        from there: a layer that gets them in another order serves each with its own adapter, and one where that is not
        known raises ValueError. What a call finds is kept for calls of the same kind. Not seen are writes that torch's
        dispatcher does not see (memory shared with numpy, other threads) and changes of the model's own code or hooks
        after its first call: attach again after those.

        Blocks hold for their thread or task alone (contextvars); the innermost counts. A new thread has none: give it
        what ``bind`` returns. A block in a generator raises RuntimeError; ``bind`` is for that, too.

        Raises:
            KeyError: an unknown name. TypeError: names that are no list. ValueError: at a call, a batch that does not
            fit. RuntimeError: a block in a generator, or a call in a context copied from a block that has ended.
        """
        return Use(self, self._in_use(named(names), checked_repeats(repeats)))

    def bind(self, names: str | Sequence[str | None] | None, repeats: int | None = None) -> BoundModel:
        """The model with these adapters: to be called, or to ``generate``, in any thread, executor or generator.

        Arguments and errors as in ``use``. Names are looked up at every call.
        """
        each, repeats = named(names), checked_repeats(repeats)
        with self._lock:
            for name in set(each) - {None}:
                self._find(name)
        return BoundModel(self.model, each, repeats, lambda: self._in_use(each, repeats))

    def check_outside(self, name: str) -> None:
        """RuntimeError if calls outside of ``use`` are to raise."""
        if self.outside == "error" and self._attached:  # a graph, or another MultiLoRA, may call what was detached
            raise RuntimeError(
                f"{name or type(self.model).__name__} is called outside of use(), in a model attached with"
                " outside='error': a new thread or executor sees no block of another one. Run what bind(names) returns"
            )

    def check_in_place(self) -> None:
        """RuntimeError if the model calls other modules by now than those that adapters were attached to."""
        check_in_place(self._edges)

    def detach(self) -> None:
        """Make the model plain again and forget all adapters. Idempotent."""
        with self._changing:
            for replaced in (*self._attached.values(), *self._replaced.values()):
                replaced.take_back()
            for name in self.names:
                self.remove(name)
            with self._lock:
                self._attached, self._replaced, self._edges = {}, {}, []
            self.layouts = {}

    @property
    def names(self) -> list[str]:
        """Names of the adapters, oldest first."""
        with self._lock:
            return list(self._entries)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that some adapter changed at some time."""
        with self._lock:
            return [attached.name for attached in self._attached.values()]

    @property
    def banks(self) -> dict[str, AdapterBank]:
        """The bank of each of these layers that is linear, by the layer's name."""
        with self._lock:
            return {a.name: a.bank for a in self._attached.values() if isinstance(a, AttachedLinear)}

    @property
    def in_use(self) -> int:
        """How many adapters are held by calls that run or by ``use`` blocks, those that were removed meanwhile included."""
        with self._lock:
            return sum(entry.users > 0 for entry in (*self._entries.values(), *self._leaving))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        with self._lock:
            size = sum(attached.nbytes for attached in self._attached.values())
            what = f"{len(self)} of {self._max_adapters} adapters, {len(self._attached)} layers"
        return f"MultiLoRA({type(self.model).__name__}: {what}, {size / 2**20:.1f} MiB)"

    def _find(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise KeyError(f"no adapter {name!r} is attached") from None

    @contextmanager
    def _in_use(self, names: tuple[str | None, ...], repeats: int) -> Iterator[None]:
        with self._lock:
            entries = {name: self._find(name) for name in names if name is not None}
            for entry in entries.values():
                entry.users += 1
        request = Request(self, names, entries, repeats)
        try:
            with in_force(request):
                yield
        finally:
            self._end(request)

    def _end(self, request: Request) -> None:
        with self._lock:
            for entry in request.entries.values():
                entry.users -= 1
        if self._leaving:
            self._free_unused(request.entries.values())

    def _free_unused(self, entries: Iterable[Entry]) -> None:
        with self._lock:
            unused = [entry for entry in entries if entry in self._leaving and not entry.users and not entry.freed]
            for entry in unused:
                entry.freed = True
        for entry in unused:
            self._free(entry)
        with self._lock:
            self._leaving.difference_update(unused)

    def _free(self, entry: Entry) -> None:
        for attached in entry.ids:
            attached.remove(entry)

    def _add_all(self, adapters: Mapping[str, str | PathLike]) -> None:
        for name in adapters:
            if not isinstance(name, str):
                raise TypeError(f"the name of an adapter must be a string, got {type(name).__name__}")
        with self._changing:
            with self._lock:
                for name in adapters:
                    if name in self._entries:
                        raise ValueError(f"adapter {name!r} is attached already: remove it first")
                held = len(self._entries) + len(self._leaving)
            if held + len(adapters) > self._max_adapters:
                raise RuntimeError(
                    f"no room for {len(adapters)} more adapters: {held} of {self._max_adapters} are held"
                )
            modules = dict(self.model.named_modules(remove_duplicate=False))
            fitted = {name: fit(Checkpoint(folder), modules, self._attached) for name, folder in adapters.items()}
            max_rank = self._checked_rank(fitted)
            new = self._new_layers(fitted, max_rank)
            layers = {**self._attached, **new}
            _reserve(fitted, layers)
            entries: dict[str, Entry] = {}
            try:
                for name, one in fitted.items():
                    entries[name] = Entry(name, next(self._serial))
                    self._load(entries[name], one, layers)
            except BaseException:
                for entry in entries.values():
                    self._free(entry)
                raise
            for attached in new.values():
                attached.put()
            if new:
                self._replace_entries([attached.name for attached in new.values()])
            with self._lock:
                self._max_rank = max_rank
                self._attached = layers
                self._edges = edges(self.model, self.layers) if new else self._edges
                self._entries.update(entries)

    def _replace_entries(self, layers: list[str]) -> None:
        self.layouts = {}
        attached = {id(a.module) for a in self._attached.values()}
        for name, module in entries_above(self.model, layers).items():
            if name not in self._replaced and id(module) not in attached:
                self._replaced[name] = AttachedEntry(self, name, module)
                self._replaced[name].put()
        if "generate" not in self._replaced and hasattr(self.model, "generation_config"):
            self._replaced["generate"] = AttachedGenerate(self, "generate", self.model)
            self._replaced["generate"].put()

    def _checked_rank(self, fitted: dict[str, Fitted]) -> int:
        parts = [(one.checkpoint, part) for one in fitted.values() for part in one.checkpoint.parts.values()]
        if self._max_rank is None:
            return max(_MAX_RANK, *(part.rank for _, part in parts), 1)
        for checkpoint, part in parts:
            if part.rank > self._max_rank:
                reason = f"has rank {part.rank}, but attach_adapters was called for ranks up to {self._max_rank}"
                raise refuse(checkpoint.file, part.key, reason)
        return self._max_rank

    def _new_layers(self, fitted: dict[str, Fitted], max_rank: int) -> dict[nn.Module, Attached]:
        stored: dict[nn.Module, tuple[str, set[torch.dtype]]] = {}
        for one in fitted.values():
            for name, layer in one.layers.items():
                if layer not in self._attached:
                    stored.setdefault(layer, (name, set()))[1].update(one.checkpoint.parts[name].dtypes)
        return {
            layer: AttachedExperts(self, name, layer, self._kept(name, layer.down_proj.dtype, dtypes))
            if takes(layer)
            else AttachedLinear(self, name, layer, self._bank(name, layer, dtypes, max_rank))
            for layer, (name, dtypes) in stored.items()
        }

    def _kept(self, name: str, own: torch.dtype, stored: set[torch.dtype]) -> torch.dtype:
        # In which dtype a layer of this one keeps adapters.
        wide = accumulate_dtype(own)
        dtype = self._dtype or (own if stored == {own} else wide)
        if dtype not in (own, wide):
            allowed = " or ".join(dict.fromkeys(map(str, (own, wide))))
            raise ValueError(f"dtype is {dtype}, but {name} is {own} and takes adapters in {allowed}")
        return dtype

    def _bank(self, name: str, layer: nn.Module, stored: set[torch.dtype], max_rank: int) -> AdapterBank:
        dtype = self._kept(name, dtype_of(layer, self._dtype or torch.float32), stored)
        K, N = features(layer)
        return AdapterBank(
            K, N, max_adapters=self._max_adapters, max_rank=max_rank, dtype=dtype, device=device_of(layer)
        )

    def _load(self, entry: Entry, fitted: Fitted, attached: dict[nn.Module, Attached]) -> None:
        for module, adapter, shared in fitted.adapters(self._pool):
            attached[module].add(entry, adapter)
            if attached[module] in entry.ids:
                entry.shared += shared


def _reserve(fitted: Mapping[str, Fitted], attached: Mapping[nn.Module, Attached]) -> None:
    # One piece of memory in each bank for all that come at once. What adapters share is not counted: it may be there.
    ranks: dict[AttachedLinear, list[int]] = {}
    for one in fitted.values():
        for name, layer in one.layers.items():
            part = one.checkpoint.parts[name]
            if part.rank and not part.method.stored.shared and not takes(layer):
                ranks.setdefault(attached[layer], []).append(part.rank)
    for layer, each in ranks.items():
        layer.bank.reserve(each)

"""Where a batch enters an attached model: there its sequences are counted, once, and its rows are followed from there."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .compiled import number_of
from .layer import Replacement
from .request import Batch, Request, batch_of, bound, current_request, in_force
from .rows import UNKNOWN, Rows

# Inputs that may hold the batch; a model's own main_input_name comes first, and any other tensor last.
_MAIN = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "hidden_states")
# Items, of which a sequence may have none or several: not one per sequence, even if there are as many.
_ITEMS = re.compile("pixel|image|video|audio|vision|frame|grid|patch|feature")
# What a model kept of earlier calls.
_STATES = re.compile("past|layer_past|mems|cache|state")
# Kinds of calls whose layouts are remembered.
_CALLS = 64


class AttachedEntry(Replacement):
    """The forward of the model, and of its parts down to the first list of layers: counts a batch and follows it."""

    def __init__(self, owner, name: str, module: nn.Module):
        super().__init__(owner, name, module)
        self.__wrapped__ = getattr(module, self.method)
        try:
            self._signature = inspect.signature(self.__wrapped__)
        except (TypeError, ValueError):
            self._signature = None
        self.number = number_of(self)

    def __call__(self, *args, **kwargs) -> Any:
        if torch.compiler.is_compiling():
            return self._in_graph(args, kwargs)
        request = current_request(self.owner)
        if request is None:
            self.owner.check_outside(self.name)
        elif not self.name:
            self.owner.check_in_place()
        if request is None or request.uniform or batch_of(request) is not None:
            return self.inner(*args, **kwargs)
        given = self._given(args, kwargs)
        main = self._main(given)
        if main is None:
            return self.inner(*args, **kwargs)
        copies = self._copies(request, main, given[main])
        # All that may send a call another way through the model, sizes and values of tensors apart.
        described = tuple(map(_described, args)), tuple((n, _described(v)) for n, v in kwargs.items())
        kind = self, self.module.training, torch.is_grad_enabled(), described
        layouts = self.owner.layouts  # another dictionary as soon as another layer gets adapters
        batch = Batch(request, copies, layouts.get(kind, {}))
        trace = batch.trace
        with bound(batch):
            if trace is None:
                return self.inner(*args, **kwargs)
            for name, value in given.items():
                _mark(batch, name, value, name == main)
            with trace:
                y = self.inner(*args, **kwargs)
        if batch.settled and not trace.decided:
            for oldest in list(layouts)[: len(layouts) + 1 - _CALLS]:  # other threads may do the same
                layouts.pop(oldest, None)
            layouts[kind] = batch.layouts
        return y

    def _given(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        names = list(self._signature.parameters) if self._signature is not None else []
        names += [f"argument_{i}" for i in range(len(names), len(args))]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _main(self, given: dict[str, Any]) -> str | None:
        tensors = [name for name, value in given.items() if isinstance(value, Tensor) and value.dim()]
        main = getattr(self.module, "main_input_name", None)
        if isinstance(main, str) and _ITEMS.search(main) and ("input_ids" in tensors or "inputs_embeds" in tensors):
            main = None  # items of prompts
        for name in (main, *_MAIN):
            if name in tensors:
                return name
        return tensors[0] if tensors else None

    def _copies(self, request: Request, main: str, x: Tensor) -> int:
        copies = request.copies(x.shape[0])
        if not copies:
            each = "" if request.repeats == 1 else f", {request.repeats} rows each"
            raise ValueError(
                f"use() names {len(request.names)} sequences{each}, but {self.name or type(self.module).__name__} gets"
                f" {main} of shape {tuple(x.shape)}: give one name per sequence, use(names, repeats=n) for n rows of each"
                " in a run, or one adapter for all rows with use('name')"
            )
        return copies

    def _in_graph(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = self._given(args, kwargs)
        main = self._main(given)
        if main is None or self.owner.graph_batch is not None:
            return self.inner(*args, **kwargs)
        # What may send the call another way; caches and the like, which cannot be handed to an op, by their names.
        others = [f"{n!r}: {v!r}" for n, v in given.items() if v is None or isinstance(v, (bool, int, float, str))]
        names = [n for n, v in given.items() if isinstance(v, Tensor) and n != main]
        opaque = [
            n
            for n, v in given.items()
            if v is not None and not isinstance(v, (bool, int, float, str, Tensor)) and not _STATES.match(n)
        ]
        self.owner.graph_batch = torch.ops.peftkern.attached_entry(
            given[main],
            self.number,
            main,
            ", ".join(others),
            [given[n] for n in names],
            " ".join(names),
            " ".join(opaque),
        )
        try:
            return self.inner(*args, **kwargs)
        finally:
            self.owner.graph_batch = None

    def batch_of_graph(self, x: Tensor, main: str, others: str, tensors: dict, opaque: str) -> Batch | None:
        """The batch of a compiled call with the main input x, or None if all rows take the same adapter.

        ``others``: its constants, as source. ``tensors``: its other tensors. ``opaque``: names of the rest
        """
        request = current_request(self.owner)
        if request is None:
            self.owner.check_outside(self.name)
        if request is None or request.uniform:
            return None
        kind = self, self.module.training, _described(x), main, others, _described(tensors), opaque
        key = kind, self._copies(request, main, x)
        batch = request.batches.get(key)
        if batch is None or batch.lost:
            known = self.owner.layouts
            layouts = known.get(kind)
            if not layouts:
                if opaque:
                    raise RuntimeError(self._not_followed(f"with arguments such as {opaque}"))
                given = {**ast.literal_eval(f"{{{others}}}"), **tensors, main: x}
                layouts = known[kind] = self._followed(Batch(request, key[1], {}), given, main)
            batch = request.batches[key] = Batch(request, key[1], layouts)
            batch.number = number_of(batch)
        return batch

    def _not_followed(self, why: str) -> str:
        return (
            f"{self.name or type(self.module).__name__} was compiled, and a batch with several adapters cannot be followed"
            f" through it {why}: call it without torch.compile for such batches, compile its layers one by one, or name"
            " one adapter"
        )

    def _followed(self, batch: Batch, given: dict[str, Any], main: str) -> dict:
        # A graph cannot be watched: the model runs once more beside it, as it is, without its caches.
        for name, value in given.items():
            _mark(batch, name, value, name == main)
        args = [given.pop(name) for name in list(given) if name.startswith("argument_")]
        trace = batch.trace
        try:
            with bound(batch), torch.no_grad(), trace:
                self.inner(*args, **given)
        except Exception as error:
            raise RuntimeError(self._not_followed("without its caches")) from error
        return batch.layouts if batch.settled and not trace.decided else {}


def _described(value: Any, depth: int = 3) -> Any:
    if isinstance(value, Tensor):
        return tuple(size == 1 for size in value.shape)  # squeeze() and broadcasting ask for that
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if depth and isinstance(value, (list, tuple)):
        return type(value), tuple(_described(v, depth - 1) for v in value)
    if depth and isinstance(value, dict):
        return type(value), tuple((str(n), _described(v, depth - 1)) for n, v in value.items())
    return type(value)


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth - 1)


def _mark(batch: Batch, name: str, value: Any, main: bool) -> None:
    if _STATES.match(name) and not main:
        return  # their rows are those of the tokens that meet them
    for t in _tensors(value):
        if main or (t.dim() >= 2 and not _ITEMS.search(name) and t.shape[0] == batch.rows):
            batch.trace.mark(t, Rows(0))
        elif t.dim() >= 2 and t.shape[0] != 1 and not (name == "position_ids" and t.dim() == 3):
            batch.trace.mark(t, UNKNOWN)


class AttachedGenerate(Replacement):
    """The model's generate: it makes several rows of each sequence, as many as its arguments say."""

    method = "generate"

    def __init__(self, owner, name: str, module: nn.Module):
        super().__init__(owner, name, module)
        self.__wrapped__ = getattr(module, self.method)

    def __call__(self, *args, **kwargs) -> Any:
        request = current_request(self.owner)
        if request is None:
            self.owner.check_outside("generate")
        copies = self._copies(args, kwargs)
        if request is None or request.uniform or copies == 1:
            return self.inner(*args, **kwargs)
        with in_force(request.within_generate(copies)):
            return self.inner(*args, **kwargs)

    def _copies(self, args: tuple, kwargs: dict[str, Any]) -> int:
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        sources = [kwargs, vars(config) if config is not None else {}, vars(self.module.generation_config)]
        settings = ("num_beams", "num_return_sequences")
        return max(next((n for s in sources if (n := s.get(name)) is not None), 1) for name in settings)


def entries_above(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The model and its parts above these layers, down to the first list of layers: where callers may come in."""
    found = {"": model}
    for name in names:
        module, path = model, ""
        for part in name.split(".")[:-1]:
            module, path = module._modules[part], f"{path}.{part}".lstrip(".")
            if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                break
            found[path] = module
    return found

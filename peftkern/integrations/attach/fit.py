"""Which layers of a model a checkpoint's adapters belong to."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Container, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...checks import accumulate_dtype
from ...many.pool import Pool
from ...methods.registry import Held
from ...methods.stored import Size, Unfit
from ..experts import attached
from .checkpoint import Checkpoint, Part
from .keys import PREFIX, complaint
from .layer import device_of, dtype_of, features, frozen, frozen_at_work, layer_reason
from .reach import bypass
from .weights import refuse


class Fitted(NamedTuple):
    """A checkpoint and the layer of the model for each of its parts, both by the model's names.

    ``sizes``: of the layers, in the model's order.
    """

    checkpoint: Checkpoint
    layers: dict[str, nn.Module]
    sizes: list[Size]

    def adapters(self, pool: Pool) -> Iterator[tuple[nn.Module, Any, list[Tensor]]]:
        """(layer, its adapter as it keeps it, the tensors that it has from ``pool``) of every part, one after the other.

        What an adapter takes of the layer's weight and bias it takes now, once.
        """
        shared = self.checkpoint.shared_tensors(self.sizes)
        pooled: dict[tuple, dict[str, Tensor]] = {}
        for name, own in self.checkpoint.tensors():
            part, layer = self.checkpoint.parts[name], self.layers[name]
            if attached.takes(layer):
                yield layer, attached.adapter(layer, part, own), []
                continue
            where = device_of(layer), accumulate_dtype(dtype_of(layer))
            if where not in pooled:
                pooled[where] = {name: pool.get(t, *where) for name, t in shared.items()}
            tensors = {name: t.to(*where) for name, t in own.items()} | pooled[where]
            stored = part.method.stored
            held = Held(name, part.method, *stored.take(part.settings, part.module, tensors), rank=part.rank)
            weight, bias, _ = (frozen_at_work if stored.base(part.settings) else frozen)(layer)
            with torch.no_grad():
                adapter = held.adapter(weight.t() if type(layer) is Conv1D else weight, bias)
            yield layer, adapter, list(pooled[where].values())


def fit(checkpoint: Checkpoint, modules: dict[str, nn.Module], held: Container[nn.Module]) -> Fitted:
    """The layers that ``checkpoint`` changes. ``modules``: the model's by name, the model itself as ``""``;
    ``held``: layers with adapters already.

    Names that an earlier transformers used are found by the map that transformers has for the model. Of a file with
    adapters of several models (diffusers), those of this model are taken. Warns of layers that the config names and
    the file leaves out: there the adapter has no effect.

    Raises ValueError, with file and key, for a checkpoint that does not fit.
    """
    find = _Finder(modules)
    checkpoint = checkpoint.renamed(names := _names(checkpoint, find))
    layers: dict[str, nn.Module] = {}
    covered: set[nn.Module] = set()
    for old, name in names.items():
        part = checkpoint.parts[name]
        layer = modules.get(name)
        if layer is None:
            raise refuse(checkpoint.file, part.key, _absent(name, modules))
        experts = attached.takes(layer)
        reason = None
        if layer not in held:
            reason = (attached.reason(layer) if experts else layer_reason(layer)) or bypass(name, modules)
        if reason is not None:
            raise refuse(checkpoint.file, part.key, f"{name} {reason}")
        own = attached.parameters(layer, part)
        if own and not experts:
            reason = f"{name} has an adapter of its parameter {own[0]!r}: of such those of experts are served alone"
            raise refuse(checkpoint.config_file, "target_parameters", reason)
        if not own and (experts or (checkpoint.targets(name) is False and checkpoint.targets(old) is False)):
            targets = "target_parameters" if experts else "target_modules"
            raise refuse(checkpoint.file, part.key, f"is of a layer that the config's {targets} do not name")
        if layer in covered:
            raise refuse(checkpoint.file, part.key, f"{name} shares its module with another key of the file")
        _check_shapes(checkpoint, part, layer)
        layers[name] = layer
        covered.add(layer)
    _check_copies(checkpoint, find)
    missing = [
        name for name, module in modules.items() if module not in covered and _named(checkpoint, name, module, held)
    ]
    if missing:
        warnings.warn(
            f"{checkpoint.file}: holds nothing for {len(missing)} layers that the config's target_modules or"
            f" target_parameters name ({missing[0]}{', ...' if len(missing) > 1 else ''}): the adapter has no effect there",
            stacklevel=2,
        )
    if missing and checkpoint.incomplete:
        shared = " and ".join(next(iter(checkpoint.parts.values())).method.stored.shared)
        reason = f"is missing, and {shared}, which the file lacks too, are made for the largest of all layers"
        raise refuse(checkpoint.file, f"{PREFIX}{missing[0]}", reason)
    sizes = [Size(*features(m), dtype_of(m)) for m in modules.values() if m in covered and not attached.takes(m)]
    return Fitted(checkpoint, layers, sizes)


def _named(checkpoint: Checkpoint, name: str, module: nn.Module, held: Container[nn.Module]) -> bool:
    """Whether the config surely wants an adapter for this layer of the model."""
    if attached.takes(module):
        part = next(iter(checkpoint.parts.values()))
        return bool(attached.parameters(module, part._replace(module=name)))
    return bool(checkpoint.targets(name)) and (module in held or layer_reason(module) is None)


def _check_shapes(checkpoint: Checkpoint, part: Part, layer: nn.Module) -> None:
    if attached.takes(layer):
        try:
            sizes = attached.sizes(layer, part)
        except Unfit as unfit:
            raise refuse(checkpoint.config_file, unfit.key, unfit.reason) from None
    else:
        K, N = features(layer)
        sizes = {"K": K, "N": N, "R": part.rank, "G": part.rank, "1": 1}
    for name, key in part.keys.items():
        shape, expected = checkpoint.shape(key), tuple(sizes[axis] for axis in part.axes[name])
        if shape != expected:
            raise refuse(checkpoint.file, key, f"has shape {shape}, expected {expected}")
    for name, key in checkpoint.shared.items():
        shape, least = checkpoint.shape(key), tuple(sizes[axis] for axis in part.method.stored.shared[name])
        if any(n < m for n, m in zip(shape, least, strict=True)):
            raise refuse(checkpoint.file, key, f"has shape {shape}, expected at least {least}")


class _Finder:
    """The name that a module of a file has in the model. ``modules``: the model's by name."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules = modules

    def __call__(self, name: str) -> str:
        return name if name in self.modules else self._rename(name)

    @cached_property
    def _rename(self) -> Callable[[str], str]:
        # What transformers does to the names in a checkpoint that an earlier release made of this model.
        model = self.modules[""]
        if not isinstance(model, PreTrainedModel):
            return str
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming, rename_source_key
        except ImportError:  # transformers 4: expressions, of which the first that fits counts
            patterns = getattr(model, "_checkpoint_conversion_mapping", {})
            return lambda name: next(
                (new for new, count in (re.subn(*pair, name) for pair in patterns.items()) if count), name
            )
        # The maps speak of weights. Their converters, which fuse or permute weights, have no counterpart for adapters.
        steps = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
        return lambda name: rename_source_key(f"{name}.weight", steps, [])[0].removesuffix(".weight")


def _names(checkpoint: Checkpoint, find: _Finder) -> dict[str, str]:
    """Module of the file -> module of the model, which may lack it."""
    names = {name: find(name) for name in checkpoint.parts}
    if checkpoint.config is not None or any(name in find.modules for name in names.values()):
        return names
    # A pipeline's file: its models' adapters, each behind the name that the pipeline has for the model.
    of_model: dict[str, dict[str, str]] = {}
    for name in checkpoint.parts:
        model, _, rest = name.partition(".")
        of_model.setdefault(model, {})[name] = find(rest)
    fitting = [model for model, found in of_model.items() if all(name in find.modules for name in found.values())]
    if len(fitting) > 1:
        raise ValueError(f"{checkpoint.file}: holds adapters for {' and '.join(fitting)}, which all fit this model")
    return of_model[fitting[0]] if fitting else names


def _absent(name: str, modules: dict[str, nn.Module]) -> str:
    experts = re.match(r"(.+)\.\d+\.[^.]+$", name)
    if experts and experts[1] in modules and any(w.dim() == 3 for w in modules[experts[1]].parameters(recurse=False)):
        return f"is of one expert, a slice of a parameter of {experts[1]}: adapters of slices are not served"
    return f"the model has no module {name!r}"


def _check_copies(checkpoint: Checkpoint, find: _Finder) -> None:
    # Modules that the file holds whole must be the model's own: an adapter here changes no weight.
    names = set()
    for key, name in checkpoint.copies.items():
        module, _, last = name.rpartition(".")
        name = f"{find(module)}.{last}"
        own = getattr(find.modules.get(find(module)), last, None)
        if not isinstance(own, torch.Tensor):
            raise refuse(checkpoint.file, key, complaint(key))
        saved = checkpoint.tensor(key)
        if saved.shape != own.shape or not torch.equal(saved.to(own), own):
            reason = f"differs from the model's {name}, which is not changed here: load it into the model first"
            raise refuse(checkpoint.file, key, reason)
        names.add(name)
    for saved in (checkpoint.config or {}).get("modules_to_save") or []:
        for module in find.modules:
            if module == saved or module.endswith(f".{saved}"):
                for name, _ in find.modules[module].named_parameters(module):
                    if name not in names:
                        raise refuse(checkpoint.file, f"{PREFIX}{name}", "is missing, though modules_to_save names it")

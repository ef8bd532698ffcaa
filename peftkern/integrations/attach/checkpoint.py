"""Adapters on disk, as PEFT or diffusers saved them, read and checked before they are used.

Every complaint is a ValueError that names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...methods.registry import Method, stored_as
from ...methods.stored import Size
from . import keys
from .config import CONFIG, check_config, read_config, targets
from .weights import DIFFUSERS, Weights, refuse

_METADATA = "lora_adapter_metadata"


# What the settings of a file without any are.
_UNSAID = {"peft_type": "LORA"}


class Part(NamedTuple):
    """The adapter of one layer, as the file describes it.

    Attributes:
        method: of the adapter. settings, module: from which the method reads it. rank: R, 0 without a branch.
        axes: of each tensor by its name. keys: in the file. dtypes: of the matrices there.
    """

    method: Method
    settings: dict[str, Any]
    module: str
    rank: int
    axes: dict[str, str]
    keys: dict[str, str]
    dtypes: tuple[torch.dtype, ...]

    @property
    def key(self) -> str:
        """The first of the keys."""
        return next(iter(self.keys.values()))


class Checkpoint:
    """A folder that PEFT's ``save_pretrained`` wrote (or diffusers' ``save_lora_weights``), config and header checked.

    Attributes:
        file: the weights. config: its settings; None where the file holds adapters of several models (diffusers) or
            no settings. parts: module name -> what the file holds for it. shared: name -> key of a tensor that all
            parts share. copies: key -> name of the weight of the base model that it repeats, if it fits (PEFT saves
            embeddings and heads along with their adapters).

    Raises:
        ValueError: a file that is missing, unreadable, corrupt or truncated; a setting or key that no served method has;
            shapes that contradict each other or the config.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.config_file = folder / CONFIG
        self.parts: dict[str, Part] = {}
        self.shared: dict[str, str] = {}
        self.copies: dict[str, str] = {}
        self.config: dict[str, Any] | None
        if self.config_file.exists() or not any((folder / name).exists() for name in DIFFUSERS):
            self.config = read_config(self.config_file)
            self._weights = Weights(folder)
            self._read(keys.parse, {"": self.config})
        else:
            self._weights = Weights(folder, DIFFUSERS)
            settings = self._settings()
            self.config = settings.get("")
            self._read(keys.parse_diffusers, settings)

    @property
    def file(self) -> Path:
        """The file of the weights."""
        return self._weights.file

    @property
    def incomplete(self) -> bool:
        """Whether tensors that all parts share are not in the file."""
        return not self.shared and any(part.method.stored.shared for part in self.parts.values())

    def _settings(self) -> dict[str, dict[str, Any]]:
        # diffusers packs LoraConfig's settings into the file, those of each of the pipeline's models behind its name.
        if _METADATA not in self._weights.metadata:
            return {}
        try:
            packed = json.loads(self._weights.metadata[_METADATA])
        except ValueError as error:
            raise refuse(self.file, _METADATA, f"is no JSON ({error})") from None
        if not isinstance(packed, dict):
            raise refuse(self.file, _METADATA, f"holds a {type(packed).__name__}, expected an object")
        settings: dict[str, dict[str, Any]] = {}
        for key, value in packed.items():
            model, _, name = key.rpartition(".")
            settings.setdefault(model, {})[name] = value
        return {
            model: check_config(config, self.file, f"{_METADATA}: {model}." if model else f"{_METADATA}: ")
            for model, config in settings.items()
        }

    def _read(self, parse, settings: Mapping[str, dict[str, Any]]) -> None:
        forms = [stored_as(config).stored for config in settings.values() or [_UNSAID]]
        names, shared = ({name for form in forms for name in getattr(form, kind)} for kind in ("names", "shared"))
        found: dict[str, dict[str, str]] = {}
        adapters = set()
        for name in self._weights.header:
            key = parse(name, names, shared)
            if key is None:
                copied = keys.copied(name)
                if keys.for_training(name):
                    continue
                if copied is None or parse is keys.parse_diffusers:
                    raise refuse(self.file, name, keys.complaint(name))
                self.copies[name] = copied
                continue
            parts = self.shared if key.module is None else found.setdefault(key.module, {})
            adapters.add(key.adapter)
            if key.part in parts or len(adapters) > 1:
                raise refuse(self.file, name, "belongs to another adapter than the keys before it")
            parts[key.part] = name
        if not found:
            raise ValueError(f"{self.file}: holds no adapter")
        for module, parts in found.items():
            self.parts[module] = self._part(module, parts, settings)
        self._check_shared()

    def _part(self, module: str, found: dict[str, str], settings: Mapping[str, dict[str, Any]]) -> Part:
        model, _, rest = module.partition(".")
        config, module = (settings[model], rest) if model in settings else (settings.get(""), module)
        if config is None:
            # diffusers takes the ranks from the file then, and alpha for the rank.
            rank = max(1, *((*self.shape(key), 1)[0] for name, key in found.items() if "lora_A" in name), 1)
            config = {**stored_as(_UNSAID).stored.reads, **_UNSAID, "r": rank, "lora_alpha": rank}
        method = stored_as(config)
        axes = dict(method.stored.shapes(config, module))
        for name in axes:
            if name not in found:
                raise refuse(self.file, keys.beside(*reversed(next(iter(found.items()))), name), "is missing")
        for name, key in found.items():
            if name not in axes:
                raise refuse(self.file, key, keys.complaint(key))
        rank = method.stored.rank(config, module)
        sizes = {"R": rank, "1": 1}
        for name in axes:
            self._check(found[name], axes[name], sizes)
        matrices = [found[name] for name in axes if len(axes[name]) == 2 and "1" not in axes[name]]
        dtypes = tuple(self._weights.header[key].dtype for key in matrices)
        return Part(method, config, module, rank, axes, {name: found[name] for name in axes}, dtypes)

    def _check(self, key: str, axes: str, sizes: dict[str, int]) -> None:
        """Whether the header's shape has these axes. ``sizes``: of those known so far, to which the others are added."""
        shape, dtype, stored = self._weights.header[key]
        expected = ", ".join(str(sizes.get(axis, axis)) for axis in axes) + "," * (len(axes) == 1)
        if len(shape) != len(axes):
            raise refuse(self.file, key, f"has shape {shape}, expected ({expected})")
        if dtype is None:
            raise refuse(self.file, key, f"is stored as {stored}, expected floats of 8 to 64 bits")
        for size, axis in zip(shape, axes, strict=True):
            if sizes.setdefault(axis, size) != size:
                if axis == "R":
                    raise refuse(self.file, key, f"has shape {shape}, but the config gives it rank {sizes['R']}")
                raise refuse(self.file, key, f"has shape {shape}, expected ({expected})")

    def _check_shared(self) -> None:
        part = next(iter(self.parts.values()))
        stored = part.method.stored
        if stored.shared and not stored.saves_shared(part.settings):
            self.shared = {}  # PEFT reads none then, whether or not the file has them
            return
        for name, axes in stored.shared.items():
            if name not in self.shared:
                raise refuse(self.file, f"base_model.{name}", "is missing")
            self._check(self.shared[name], axes, {"R": part.rank})

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of one tensor of the file."""
        return self._weights.header[key].shape

    def targets(self, module: str) -> bool | None:
        """Whether the config wants an adapter for a linear layer of this name; None if it does not surely say."""
        return None if self.config is None else targets(self.config, module)

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same with other names of modules; parts without one are left out."""
        other = copy(self)
        other.parts = {names[module]: part for module, part in self.parts.items() if module in names}
        return other

    def tensor(self, key: str) -> Tensor:
        """One tensor of the file."""
        return next(self._weights.read([key]))

    def tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(module, its tensors by name) of every part, one after the other."""
        read = self._weights.read([key for part in self.parts.values() for key in part.keys.values()])
        for module, part in self.parts.items():
            yield module, dict(zip(part.keys, read, strict=False))

    def shared_tensors(self, layers: Sequence[Size]) -> dict[str, Tensor]:
        """The tensors by name that all parts share: the file's, or else those that the settings stand for.

        ``layers``: all that the checkpoint changes, in the model's order.
        """
        part = next(iter(self.parts.values()))
        if not part.method.stored.shared:
            return {}
        if self.shared:
            return dict(zip(self.shared, self._weights.read(self.shared.values()), strict=True))
        return dict(part.method.stored.made(part.settings, layers))

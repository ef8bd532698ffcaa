"""Adapters on disk, as PEFT or diffusers saved them, read and checked before they are used.

Every complaint is a ValueError that names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import keys
from .config import CONFIG, DEFAULTS, check_config, rank_of, read_config, scaling_of, targets
from .weights import DIFFUSERS, Weights, refuse

_METADATA = "lora_adapter_metadata"


class Part(NamedTuple):
    """The adapter of one layer, as the file describes it."""

    rank: int
    in_features: int
    out_features: int
    scaling: float
    dtypes: tuple[torch.dtype, torch.dtype]
    key_A: str
    key_B: str


class Checkpoint:
    """A folder that PEFT's ``save_pretrained`` wrote (or diffusers' ``save_lora_weights``), config and header checked.

    Attributes:
        file: the weights. config: its settings; None where the file holds adapters of several models (diffusers) or
            no settings. parts: module name -> what the file holds for it. copies: key -> name of the weight of the
            base model that it repeats, if it fits (PEFT saves embeddings and heads along with their adapters).

    Raises:
        ValueError: a file that is missing, unreadable, corrupt or truncated; a setting or key other than plain LoRA's;
            shapes that contradict each other or the config.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.config_file = folder / CONFIG
        self.parts: dict[str, Part] = {}
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
        found: dict[str, dict[str, str]] = {}
        adapters = set()
        for name in self._weights.header:
            key = parse(name)
            if key is None:
                copied = keys.copied(name)
                if keys.for_training(name):
                    continue
                if copied is None or parse is keys.parse_diffusers:
                    raise refuse(self.file, name, keys.complaint(name))
                self.copies[name] = copied
                continue
            parts = found.setdefault(key.module, {})
            adapters.add(key.adapter)
            if key.part in parts or len(adapters) > 1:
                raise refuse(self.file, name, "belongs to another adapter than the keys before it")
            parts[key.part] = name
        if not found:
            raise ValueError(f"{self.file}: holds no adapter")
        for module, parts in found.items():
            for part, other in ("AB", "BA"):
                if part not in parts:
                    raise refuse(self.file, parts[other].replace(f"lora_{other}", f"lora_{part}"), "is missing")
            self.parts[module] = self._part(module, parts["A"], parts["B"], settings)

    def _part(self, module: str, key_A: str, key_B: str, settings: Mapping[str, dict[str, Any]]) -> Part:
        A, B = self._weights.header[key_A], self._weights.header[key_B]
        for key, tensor in ((key_A, A), (key_B, B)):
            if len(tensor.shape) != 2:
                raise refuse(self.file, key, f"has shape {tensor.shape}, expected two dimensions")
            if tensor.dtype is None:
                raise refuse(self.file, key, f"is stored as {tensor.stored}, expected floats of 8 to 64 bits")
        (rank, K), (N, other) = A.shape, B.shape
        model, _, rest = module.partition(".")
        config, module = (settings[model], rest) if model in settings else (settings.get(""), module)
        if config is None:
            # diffusers takes the ranks from the file then, and alpha for the rank.
            config = {**DEFAULTS, "r": rank, "lora_alpha": rank}
        expected = rank_of(config, module)
        if rank != expected or rank < 1:
            raise refuse(self.file, key_A, f"has shape {A.shape}, but the config gives it rank {expected}")
        if other != rank:
            raise refuse(self.file, key_B, f"has shape {B.shape}, expected (N, {rank})")
        return Part(rank, K, N, scaling_of(config, module, rank), (A.dtype, B.dtype), key_A, key_B)

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

    def tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(module, lora_A (R, K), lora_B (N, R)) of every part, one after the other."""
        read = self._weights.read([key for part in self.parts.values() for key in (part.key_A, part.key_B)])
        yield from zip(self.parts, read, read)

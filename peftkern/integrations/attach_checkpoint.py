"""PEFT checkpoints on disk: ``adapter_config.json`` and ``adapter_model.safetensors``, checked before they are used.

Every complaint is a ValueError that names the file and the key. What the config may say is listed here; a setting that
is neither listed nor empty is refused, since it could mean another function than plain LoRA.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# PEFT saves embeddings and heads whole if they are targets or were resized.
_COPY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+?)(?:\.base_layer)?\.weight")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}

# Settings that say nothing about what a loaded adapter computes: descriptions, training, options of others below.
_IGNORED = {
    "arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Settings that are read here.
_READ = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_to_transform", "lora_alpha", "peft_type",
    "r", "rank_pattern", "target_modules", "use_rslora",
}  # fmt: skip
# Ways to begin that leave the base weights as they are; the others (PiSSA, OLoRA, ...) change them.
_INIT = (True, False, None, "gaussian", "eva", "orthogonal")


class Part(NamedTuple):
    """The adapter of one layer, as the file describes it."""

    rank: int
    in_features: int
    out_features: int
    scaling: float
    dtypes: tuple[torch.dtype, torch.dtype]
    key_A: str
    key_B: str


NO_KEY = "is no LoRA weight of a linear layer"


def refuse(file: Path, key: str, reason: str) -> ValueError:
    """The error for a key of a file that does not fit."""
    return ValueError(f"{file}: {key}: {reason}")


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{file}: is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: holds a {type(config).__name__}, expected an object")
    if config.get("peft_type") != "LORA":
        raise refuse(file, "peft_type", f"is {config.get('peft_type')!r}, expected 'LORA'")
    if config.get("bias", "none") != "none":
        raise refuse(file, "bias", f"is {config['bias']!r}: adapters that change biases are not served")
    if config.get("init_lora_weights", True) not in _INIT:
        raise refuse(file, "init_lora_weights", f"is {config['init_lora_weights']!r}, which changes the base weights")
    for key, value in config.items():
        if value and key not in _IGNORED | _READ:
            raise refuse(file, key, f"is {value!r}: only plain LoRA and rsLoRA are served")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise refuse(file, "r", f"is {rank!r}, expected a rank of at least 1")
    if not _is_number(alpha):
        raise refuse(file, "lora_alpha", f"is {alpha!r}, expected a number")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise refuse(file, key, f"is {patterns!r}, expected an object")
        for pattern, value in patterns.items():
            fits = isinstance(value, int) and value > 0 if key == "rank_pattern" else True
            if not (_is_number(value) and fits and _is_pattern(pattern)):
                raise refuse(file, key, f"has the entry {pattern!r}: {value!r}")
    for key in ("target_modules", "exclude_modules"):
        names = config.get(key) or []
        listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not listed and not (isinstance(names, str) and _is_pattern(names)):
            raise refuse(file, key, f"is {names!r}, expected a list of names or a pattern")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_pattern(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _of_module(patterns: dict[str, Any] | None, module: str, default):
    # A pattern means the module itself or the end of its path, as a regular expression; the first that fits counts.
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default


def _named(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


class Checkpoint:
    """A folder that PEFT's ``save_pretrained`` wrote, its config and the header of its weights read and checked.

    Attributes:
        file: the weights. parts: module name -> what the file holds for it. copies: key -> name of the weight of the
            base model that it repeats, if it fits (PEFT saves embeddings and heads along with their adapters).

    Raises:
        ValueError: a file that is missing, unreadable, corrupt or truncated; a setting or key other than plain LoRA's;
            shapes that contradict each other or the config.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.config_file, self.file = folder / CONFIG, folder / WEIGHTS
        self.config = _config(self.config_file)
        self.parts: dict[str, Part] = {}
        self.copies: dict[str, str] = {}
        with self._open() as weights:
            self._read(weights)

    def _open(self):
        try:
            return safe_open(self.file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.file}: cannot be read as safetensors ({error})") from None

    def _read(self, weights) -> None:
        found: dict[str, dict[str, str]] = {}
        for key in list(weights.keys()):
            match = _KEY.fullmatch(key)
            if match is None:
                copy = _COPY.fullmatch(key)
                if copy is None:
                    raise refuse(self.file, key, NO_KEY)
                self.copies[key] = f"{copy['module']}.weight"
                continue
            found.setdefault(match["module"], {})[match["part"]] = key
        if not found:
            raise ValueError(f"{self.file}: holds no adapter")
        for module, keys in found.items():
            for part in "AB":
                if part not in keys:
                    missing = f"{_PREFIX}{module}.lora_{part}.weight"
                    raise refuse(self.file, missing, "is missing")
            self.parts[module] = self._part(weights, module, keys["A"], keys["B"])

    def _part(self, weights, module: str, key_A: str, key_B: str) -> Part:
        shapes, dtypes = [], []
        for key in (key_A, key_B):
            view = weights.get_slice(key)
            shapes.append(tuple(view.get_shape()))
            dtypes.append(_DTYPES.get(view.get_dtype()))
            if len(shapes[-1]) != 2:
                raise refuse(self.file, key, f"has shape {shapes[-1]}, expected two dimensions")
            if dtypes[-1] is None:
                raise refuse(self.file, key, f"is stored as {view.get_dtype()}, expected one of {', '.join(_DTYPES)}")
        (rank, K), (N, other) = shapes
        expected = _of_module(self.config.get("rank_pattern"), module, self.config["r"])
        if rank != expected:
            raise refuse(self.file, key_A, f"has shape {shapes[0]}, but the config gives it rank {expected}")
        if other != rank:
            raise refuse(self.file, key_B, f"has shape {shapes[1]}, expected (N, {rank})")
        alpha = _of_module(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return Part(rank, K, N, scaling, (dtypes[0], dtypes[1]), key_A, key_B)

    def targets(self, module: str) -> bool:
        """Whether the config surely wants an adapter for a linear layer of this name."""
        names, excluded = self.config.get("target_modules") or [], self.config.get("exclude_modules")
        # Numbers of layers are resolved in ways that differ between releases of PEFT: no claim is made.
        if names == "all-linear" or self.config.get("layers_to_transform") not in (None, []):
            return False
        return _named(names, module) and not (excluded and _named(excluded, module))

    def tensor(self, key: str) -> Tensor:
        """One tensor of the file."""
        with self._open() as weights:
            try:
                return weights.get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise refuse(self.file, key, f"cannot be read ({error})") from None

    def tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(module, lora_A (R, K), lora_B (N, R)) of every part, one after the other."""
        with self._open() as weights:
            for module, part in self.parts.items():
                try:
                    A, B = weights.get_tensor(part.key_A), weights.get_tensor(part.key_B)
                except (SafetensorError, OSError) as error:
                    raise refuse(self.file, part.key_A, f"cannot be read ({error})") from None
                if A.shape != (part.rank, part.in_features) or B.shape != (part.out_features, part.rank):
                    raise refuse(self.file, part.key_A, "was changed while it was read")
                yield module, A, B

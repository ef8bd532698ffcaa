"""What ``adapter_config.json`` may say: settings that are read, those that say nothing, and the rest, which is refused.

PEFT's LoraConfig (0.21) decides what a key means. Some settings are read here. Some describe, or matter in training
alone. All the others change the function, and are refused unless they are empty. A key that LoraConfig does not know
is bookkeeping, which PEFT ignores, except where it may be a setting of a release to come: see ``_may_matter``.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ...methods.registry import checkpoint_types
from .weights import refuse

CONFIG = "adapter_config.json"
# Read here; PEFT's default where a file lacks it.
DEFAULTS = {"r": 8, "lora_alpha": 8}
READ = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_to_transform", "lora_alpha",
    "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora",
}  # fmt: skip
# Descriptions, training, and options of settings below that are refused themselves. VeLoRA and MonteCLoRA compute
# something else than LoRA in training only. merge_weights is of the first releases (whether eval() merged), lora_dtype
# of ms-swift, a trainer that writes PEFT's folders.
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "loftq_config", "lora_dropout", "lora_dtype", "lora_ga_config", "megatron_core",
    "merge_weights", "monteclora_config", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type", "velora_config",
}  # fmt: skip
# Those that change the function, and what they make of the adapter.
CHANGES = {
    "alora_invocation_tokens": "aLoRA", "arrow_config": "an Arrow router", "kasa_config": "KaSA",
    "layer_replication": "a model with repeated layers", "lora_bias": "a branch with a bias",
    "megatron_config": "a layer of Megatron", "target_parameters": "adapters of parameters",
    "trainable_token_indices": "trained embeddings of tokens", "use_bdlora": "BD-LoRA", "use_dora": "DoRA",
    "use_qalora": "QALoRA", "enable_lora": "adapters of a fused layer's parts (PEFT before 0.3)",
}  # fmt: skip
_OBJECTS = {"arrow_config", "kasa_config", "use_bdlora"}  # an empty object switches these on
# Ways to begin that leave the base weights as they are when an adapter is loaded; the others (PiSSA, OLoRA, CorDA,
# LoftQ) change them.
_INIT = (True, False, None, "gaussian", "eva", "lora_ga", "mica", "orthogonal")
_KNOWN_RELEASE = (0, 21)
_SETTING = re.compile(r"(use|enable|lora|alora|target|trainable|modules|layers?)_.*|.*_(config|pattern|modules)")


def read_config(file: Path) -> dict[str, Any]:
    """The settings of an adapter's ``adapter_config.json``, checked."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{file}: is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: holds a {type(config).__name__}, expected an object")
    return check_config(config, file)


def check_config(config: dict[str, Any], file: Path, prefix: str = "") -> dict[str, Any]:
    """``config`` with PEFT's defaults. Raises ValueError with ``file``, ``prefix`` and key for what is not served."""

    def wrong(key: str, reason: str) -> ValueError:
        return refuse(file, prefix + key, reason)

    config = {**DEFAULTS, **config}
    if config.get("peft_type") not in (types := checkpoint_types()):
        raise wrong("peft_type", f"is {config.get('peft_type')!r}, expected {' or '.join(map(repr, types))}")
    if config.get("bias", "none") != "none":
        raise wrong("bias", f"is {config['bias']!r}: adapters that change biases are not served")
    if config.get("init_lora_weights", True) not in _INIT:
        raise wrong("init_lora_weights", f"is {config['init_lora_weights']!r}, which changes the base weights")
    newer = _release(config.get("peft_version")) > _KNOWN_RELEASE
    for key, value in config.items():
        if key in CHANGES and (value or (key in _OBJECTS and isinstance(value, dict))):
            raise wrong(key, f"is {value!r}, which means {CHANGES[key]}: only plain LoRA and rsLoRA are served")
        if key not in READ | IGNORED | CHANGES.keys() and value and _may_matter(key, value, newer):
            written = f" (written by PEFT {config['peft_version']})" if newer else ""
            raise wrong(key, f"is {value!r}{written}: this setting is unknown and could change what is computed")
    if isinstance(config["r"], bool) or not isinstance(config["r"], int) or config["r"] < 1:
        raise wrong("r", f"is {config['r']!r}, expected a rank of at least 1")
    if not _is_number(config["lora_alpha"]):
        raise wrong("lora_alpha", f"is {config['lora_alpha']!r}, expected a number")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise wrong(key, f"is {patterns!r}, expected an object")
        for pattern, value in patterns.items():
            fits = isinstance(value, int) and value > 0 if key == "rank_pattern" else True
            if not (_is_number(value) and fits and _is_pattern(pattern)):
                raise wrong(key, f"has the entry {pattern!r}: {value!r}")
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        names = config.get(key) or []
        listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
        pattern = isinstance(names, str) and _is_pattern(names) and key != "modules_to_save"
        if not listed and not pattern:
            raise wrong(key, f"is {names!r}, expected a list of names" + " or a pattern" * (key != "modules_to_save"))
    return config


def scaling_of(config: dict[str, Any], module: str, rank: int) -> float:
    """The factor of the branch of a layer: alpha over the rank, or over its root (rsLoRA)."""
    alpha = _of_module(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def rank_of(config: dict[str, Any], module: str) -> int:
    """The rank that the config gives a layer."""
    return _of_module(config.get("rank_pattern"), module, config["r"])


def targets(config: dict[str, Any], module: str) -> bool | None:
    """Whether the config wants an adapter for a linear layer of this name; None if it does not surely say."""
    names, excluded = config.get("target_modules") or [], config.get("exclude_modules")
    # Numbers of layers are resolved in ways that differ between releases of PEFT, and no names means PEFT's own
    # choice by the type of the model: no claim is made.
    if not names or names == "all-linear" or config.get("layers_to_transform") not in (None, []):
        return None
    return _named(names, module) and not (excluded and _named(excluded, module))


def _may_matter(key: str, value: Any, newer: bool) -> bool:
    # Every setting by which PEFT ever changed the function is named like this. In a file of a release that came after
    # this one, a flag, a list or an object may be such a setting under any name; a text or a number describes.
    return _SETTING.fullmatch(key) is not None or (newer and isinstance(value, (bool, list, dict)))


def _release(version: Any) -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return tuple(map(int, match.groups())) if match else ()


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

"""What ``adapter_config.json`` may say: settings that all methods share, those of the method, and the rest.

The method's entry (``Stored``) sorts PEFT's settings of its own: those that it reads, those that describe or matter in
training alone, and those that change the function, which are refused unless they are empty. A key that PEFT does not know
is bookkeeping, which PEFT ignores, except where it may be a setting of a release to come: see ``_may_matter``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...methods.registry import checkpoint_types, stored_as
from ...methods.stored import Unfit, check_names
from .weights import refuse

CONFIG = "adapter_config.json"
# Of every method: read here, and descriptions.
READ = {"bias", "exclude_modules", "layers_to_transform", "modules_to_save", "peft_type", "target_modules"}
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "layers_pattern", "peft_version",
    "revision", "task_type",
}  # fmt: skip
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
    try:
        method = stored_as(config)
        if method is None:
            expected = " or ".join(map(repr, checkpoint_types()))
            raise Unfit("peft_type", f"is {config.get('peft_type')!r}, expected {expected}")
        config = {**method.stored.reads, **config}
        if config.get("bias", "none") != "none":
            raise Unfit("bias", f"is {config['bias']!r}: adapters that change biases are not served")
        _check_meaning(config)
        for key in ("target_modules", "exclude_modules", "modules_to_save"):
            check_names(config, key, pattern=key != "modules_to_save")
        method.stored.check(config)
    except Unfit as unfit:
        raise refuse(file, prefix + unfit.key, unfit.reason) from None
    return config


def _check_meaning(config: dict[str, Any]) -> None:
    stored = stored_as(config).stored
    known = READ | IGNORED | stored.reads.keys() | set(stored.ignores)
    newer = _release(config.get("peft_version")) > _KNOWN_RELEASE
    for key, value in config.items():
        # An empty object switches a variant on.
        if key in stored.changes and (value or isinstance(value, dict)):
            raise Unfit(key, f"is {value!r}, which means {stored.changes[key]}: that is not served")
        if key not in known and key not in stored.changes and value and _may_matter(key, value, newer):
            written = f" (written by PEFT {config['peft_version']})" if newer else ""
            raise Unfit(key, f"is {value!r}{written}: this setting is unknown and could change what is computed")


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


def _named(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)

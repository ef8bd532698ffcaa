"""How HF PEFT saves a method's adapter, as data of the method's entry: what a key, a shape and a setting mean.

So whoever serves checkpoints without PEFT knows no method, and a method that says this of itself is served.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Settings = Mapping[str, Any]  # of adapter_config.json, with the defaults of ``Stored.reads``


class Unfit(Exception):
    """A setting that is not served: its name, and why."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


class Size(NamedTuple):
    """A layer that a checkpoint changes."""

    in_features: int
    out_features: int
    dtype: torch.dtype


def _no_rank(settings: Settings, module: str) -> int:
    return 0


def _never(settings: Settings) -> bool:
    return False


def _none(settings: Settings, module: str) -> list[str]:
    return []


@dataclass(frozen=True)
class Stored:
    """The form of a checkpoint.

    Attributes:
        names: of the tensors that a layer may have in the file, as they stand behind the module's name there.
        shapes: (settings, module) -> those that the module must have, and their axes: of K, N and R, or 1.
        take: (settings, module, tensors by name) -> ``tensors`` and ``numbers`` of the adapter's ``Held``.
        rank: (settings, module) -> R, 0 without a branch.
        reads: settings that are read, and what PEFT takes where a file lacks them. check: raises ``Unfit`` for values that
            are not served.
        ignores: settings that describe, or matter in training alone. changes: settings that make the adapter another
            function, and which.
        switch: the setting that makes an adapter of PEFT's type one of this method; None for the type's own method.
        parameters: (settings, module) -> names of parameters of this module that the adapter may be of, instead of its one
            weight. ``shapes`` has G axes then, of the ranks of all that a parameter consists of.
        base: whether the adapter is computed from the layer's weight or bias.
        shared: names and axes of tensors that all layers share, each a slice from the start; K and N are the largest
            layer's then. made: (settings, the layers in the model's order) -> them, where settings say that no file has
            them (``saves_shared``).
    """

    names: tuple[str, ...]
    shapes: Callable[[Settings, str], Mapping[str, str]]
    take: Callable[[Settings, str, Mapping[str, Tensor]], tuple[tuple[Tensor | None, ...], tuple[Any, ...]]]
    rank: Callable[[Settings, str], int] = _no_rank
    reads: Settings = field(default_factory=dict)
    check: Callable[[Settings], None] = lambda settings: None
    ignores: Collection[str] = ()
    changes: Mapping[str, str] = field(default_factory=dict)
    switch: str | None = None
    parameters: Callable[[Settings, str], Collection[str]] = _none
    base: Callable[[Settings], bool] = _never
    shared: Mapping[str, str] = field(default_factory=dict)
    saves_shared: Callable[[Settings], bool] = _never
    made: Callable[[Settings, Sequence[Size]], Mapping[str, Tensor]] | None = None


def of_module(patterns: Settings | None, module: str, default: Any) -> Any:
    """The value of a ``rank_pattern`` and the like. A pattern means the module itself or the end of its path, as a regular
    expression; the first that fits counts."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default


def check_rank(settings: Settings, key: str) -> None:
    """``Unfit`` unless the setting is a rank."""
    rank = settings[key]
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise Unfit(key, f"is {rank!r}, expected a rank of at least 1")


def check_number(settings: Settings, key: str) -> None:
    """``Unfit`` unless the setting is a finite number."""
    if not is_number(settings[key]):
        raise Unfit(key, f"is {settings[key]!r}, expected a number")


def check_patterns(settings: Settings, key: str, ranks: bool = False) -> None:
    """``Unfit`` unless the setting gives patterns of modules a number each, with ``ranks`` a rank, or is empty."""
    patterns = settings[key] or {}
    if not isinstance(patterns, dict):
        raise Unfit(key, f"is {patterns!r}, expected an object")
    for pattern, value in patterns.items():
        fits = is_number(value) and (not ranks or (isinstance(value, int) and value > 0))
        if not (fits and is_pattern(pattern)):
            raise Unfit(key, f"has the entry {pattern!r}: {value!r}")


def check_names(settings: Settings, key: str, pattern: bool = True) -> None:
    """``Unfit`` unless the setting is a list of names, or with ``pattern`` a regular expression, or empty."""
    names = settings.get(key) or []
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not listed and not (pattern and isinstance(names, str) and is_pattern(names)):
        raise Unfit(key, f"is {names!r}, expected a list of names" + " or a pattern" * pattern)


def is_number(value: Any) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_pattern(pattern: str) -> bool:
    """Whether this is a regular expression."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True

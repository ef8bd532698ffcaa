"""A Bench is the benchmark of one op. Adding one takes a file in ops/ that builds a Bench, and a line in registry.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..judge.figures import Figure
from . import presets
from .case import Case, Floor, Provider
from .floor import layer_floor
from .presets import Choice, Entry


@dataclass(frozen=True)
class View:
    """What else documents show of an op's results: Markdown lines of one result, of GPUs alone or of all."""

    lines: Callable[[dict], list[str]]
    of_gpus: bool = False


@dataclass(frozen=True)
class Bench:
    """One op: what is measured, by whom, and when a result is right.

    ``presets`` by name; ``data(case, copies)`` makes tensors shared by a block; ``plan(case, preset)`` names the providers
    to time; ``floor(case, pass)``; ``gate(case)`` returns a reason if our result is not accurate, and
    ``check(provider, case)`` one if a peer computes something else than the op. ``judge(result)``: the limits that
    peftkern sets itself; ``views`` by name. ``finish(rows)``: the rows of a block with what else is to be told of them.
    Tables and plots need no more than the rows.
    """

    name: str
    providers: dict[str, Provider]
    presets: dict[str, tuple[Entry, ...]]
    data: Callable[[Case, int], Any]
    plan: Callable[[Case, str], list[str]]
    gate: Callable[[Case], str | None]
    floor: Callable[[Case, str], Floor] = layer_floor
    copies: Callable[[Case, int], int] = lambda case, cache_bytes: 1
    check: Callable[[Provider, Case], str | None] = lambda provider, case: None
    judge: Callable[[dict], list[Figure]] = lambda result: []
    views: dict[str, View] = field(default_factory=dict)
    finish: Callable[[list[dict]], list[dict]] = lambda rows: rows

    @property
    def many(self) -> bool:
        """Whether its cases have many adapters."""
        return any(entry.adapters is not None for entries in self.presets.values() for entry in entries)

    def cases(self, preset: str, device: str, choice: Choice = Choice()) -> list[Case]:  # noqa: B008  (it is frozen)
        """The preset's cases, with what ``choice`` puts in the place of their fields."""
        return presets.cases(self.name, self.presets[preset], device, presets.PRESET_DTYPES[preset], choice)

    def floor_of(self, name: str, case: Case, which: str) -> Floor:
        """The floor of a provider."""
        return (self.providers[name].floor or self.floor)(case, which)

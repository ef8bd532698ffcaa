"""What is timed of a method: the library's own code and ours, on the same parameters."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

import peftkern
from peftkern.bases.library import held

from ..core.case import Case
from ..core.presets import Choice, Entry
from ..layers import Layer


class Pair(NamedTuple):
    """Both sides, the library's first, for one copy of the weights.

    ``calls``: of a layer's arguments; ``trained``: the parameters of each that get a gradient; ``frozen``: what autograd may
    keep at no cost; ``exact()``: the library's side in fp64, and its trained parameters.
    """

    calls: tuple[Callable[..., Tensor], Callable[..., Tensor]]
    trained: tuple[list[Tensor], list[Tensor]]
    frozen: list[Tensor]
    exact: Callable[[], tuple[Callable[..., Tensor], list[Tensor]]]

    @classmethod
    def of(cls, calls: tuple[Callable, Callable], models: tuple[nn.Module, nn.Module], exact: Callable) -> Pair:
        """Of two models, of which everything may be kept, the scales of weights in codes too."""
        own = [t for model in models for t in (*model.parameters(), *model.buffers())]
        scales = [t for weight in own if (codes := held(weight)) for t in codes[1]]
        return cls(calls, tuple(map(trained, models)), own + scales, exact)


class Subject(Protocol):
    """A method where it is timed.

    Attributes:
        name: as tables have it. op: that computes it. layer: the frozen layer that it is compared with. beside: whose code
            it is compared with. on_layer: whether it computes the frozen layer too.
    """

    name: str
    op: str
    layer: Layer
    beside: str
    on_layer: bool

    def entries(self) -> tuple[Entry, ...]:
        """Sizes."""

    def choice(self, asked: Choice) -> Choice:
        """What it has of what was asked for."""

    def missing(self) -> str | None:
        """Why it cannot be timed here, or None."""

    def small(self, case: Case) -> Case:
        """The case at a size for checks."""

    def pair(self, case: Case, weights: tuple[Tensor, ...]) -> Pair:
        """Both sides around a frozen layer of these weights."""


def trained(model: nn.Module) -> list[Tensor]:
    """Of the model: what layers share may not be among the layer's own."""
    return [p for p in model.parameters() if p.requires_grad]


def randomised(stock: nn.Module, std: float) -> nn.Module:
    """With random numbers, the same ones each time, in what it trains."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for p in trained(stock):
            nn.init.normal_(p, std=std)
    return stock


def accelerated(stock: nn.Module, *, shares: bool = True, compute: str | None = None) -> tuple[nn.Module, list[str]]:
    """An accelerated copy, and the names of what is. What is frozen is one tensor for both: that of many experts is large.

    ``shares=False``: a copy of what is frozen too. ``compute``: as ``peftkern.accelerate`` takes it. Raises RuntimeError if
    something that could be accelerated is not.
    """
    frozen = [p for p in stock.parameters() if not p.requires_grad] if shares else []
    ours = copy.deepcopy(stock, {id(p): p for p in frozen})
    report = peftkern.accelerate(ours, compute=compute)
    if report.skipped or not report.accelerated:
        raise RuntimeError(f"not accelerated: {dict(report.skipped)}")
    return ours, list(report.accelerated)


def installed(library: str) -> bool:
    """Whether the package is here, without an import. (``adapters`` hides its spec once it is imported.)"""
    return library in sys.modules or importlib.util.find_spec(library) is not None

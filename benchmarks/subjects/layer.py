"""A method on a layer: the model that its ``build`` makes around a frozen layer, and an accelerated copy of it.

Adapters are in fp32 and all random, whatever the base's dtype. Layers are in training, or in evaluation where training is not
covered, and are timed without the model around them.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

import peftkern
from peftkern.methods import Method

from ..core.case import Case
from ..core.presets import Choice, Entry
from ..layers import Layer
from .subject import Pair, accelerated, installed, randomised, trained


class LayerSubject(NamedTuple):
    """A method of the registry and the layer that it is timed on."""

    method: Method
    layer: Layer

    on_layer = True

    @property
    def name(self) -> str:
        return f"{self.method.name}, {self.layer.what}" if self.layer.what else self.method.name

    @property
    def op(self) -> str:
        return self.method.op

    @property
    def beside(self) -> str:
        return next(iter(self.method.tested), "")

    def entries(self) -> tuple[Entry, ...]:
        return tuple(Entry(*shape, R=(self.method.rank,), adapter_dtypes=("fp32",)) for shape in self.layer.shapes)

    def choice(self, asked: Choice) -> Choice:
        """No rank or dropout where there is none or it is not covered, and fp32 adapters, as users have them."""
        drops = any(asked.dropouts or ()) and not self._accelerated_with_dropout()
        return dataclasses.replace(
            asked, dtypes=asked.dtypes or ("fp32",), ranks=asked.ranks if self.method.rank else None,
            dropouts=None if drops else asked.dropouts, adapters=("fp32",),
        )  # fmt: skip

    def missing(self) -> str | None:
        here = not self.beside or installed(self.beside)
        return None if here else f"{self.beside} is not installed (pip install 'peftkern[bench]')"

    def small(self, case: Case) -> Case:
        return dataclasses.replace(case, M=48, K=160, N=96, R=min(case.R, 16), dropout=0.0)

    def pair(self, case: Case, weights: tuple[Tensor, ...]) -> Pair:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stock = self.method.build(self.layer.adapted(*weights), case.R).to(case.device).train(self.method.trains)
        randomised(stock, 0.1)
        if case.dropout:
            _set_dropout(stock, case.dropout)
        ours, (name,) = accelerated(stock, shares=self.layer.shared, compute=self.layer.compute)

        def exact():
            model = self.layer.exact(stock)
            return model.get_submodule(name), trained(model)

        return Pair.of((stock.get_submodule(name), ours.get_submodule(name)), (stock, ours), exact)

    def _accelerated_with_dropout(self) -> bool:
        if not (self.method.trains and self.layer.drops):
            return False
        case = Case(self.name, "cpu", torch.float32, torch.float32, 4, 32, 24, min(self.method.rank, 8), 0.1)
        model = self.method.build(self.layer.frozen(*self.layer.data(case, 1).weights[0]), case.R).train()
        return _set_dropout(model, case.dropout) and bool(peftkern.accelerate(model).accelerated)


def _set_dropout(model: nn.Module, p: float) -> bool:
    """Give each adapter this dropout; whether the model has any."""
    parts = _drops(model)
    for part in parts:
        part.update({name: nn.Dropout(p) for name in part})
    return bool(parts)


def _drops(model: nn.Module) -> list[nn.ModuleDict]:
    # HF PEFT's layers keep an adapter's dropout in a dict of modules, nn.Identity where there is none.
    named = ((name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleDict))
    return [part for name, part in named if name.endswith("_dropout")]

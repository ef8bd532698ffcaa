"""The benchmark of a method of the registry: the library's own layer, the same layer accelerated, and the frozen linear.

The layer is the one that the method's ``build`` makes around a frozen nn.Linear without a bias, or around the layers of the
kind that the method is for (layers.py), with fp32 adapters that are all random, whatever the base's dtype. It is in training,
or in evaluation where training is not covered. Both layers are timed without the model around them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import peftkern
from peftkern.methods import METHODS, Method

from .core.bench import Bench
from .core.case import BASE, FP32_BASE, Case, Provider, Step
from .core.presets import PRESET_DTYPES, Choice, Entry
from .layers import Data, Layer, layers_of
from .peers import check as peer_check
from .peers.data import copies

LIBRARY, OURS = "library", "peftkern"


def benches(names: Iterable[str], asked: Choice) -> list[tuple[Bench, Choice]]:
    """A benchmark for each of these methods, or for all that have a layer to time, with what it has of what was asked for:
    no rank or dropout where there is none or it is not covered, and fp32 adapters, as users have them.

    Raises ValueError for a name that the registry does not have, or that has no layer.
    """
    found = {name: method for name, method in METHODS.items() if method.build is not None}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(f"no method to time is called {', '.join(unknown)}; there are {', '.join(found)}")
    timed = [_Timed(found[name], layer) for name in names or found for layer in layers_of(found[name])]
    return [(_bench(each), _choice(each, asked)) for each in timed]


class _Timed(NamedTuple):
    """A method and the layer that it is timed on."""

    method: Method
    layer: Layer

    @property
    def name(self) -> str:
        return f"{self.method.name}, {self.layer.what}" if self.layer.what else self.method.name


def _choice(timed: _Timed, asked: Choice) -> Choice:
    dropouts = asked.dropouts
    if any(dropouts or ()) and not _accelerated_with_dropout(timed):
        dropouts = None
    ranks = asked.ranks if timed.method.rank else None
    return dataclasses.replace(
        asked, dtypes=asked.dtypes or ("fp32",), ranks=ranks, dropouts=dropouts, adapters=("fp32",)
    )


def _bench(timed: _Timed) -> Bench:
    method, layer = timed
    missing = functools.partial(_missing, next(iter(method.tested), ""))
    providers = (
        Provider(BASE, "frozen layer", lambda case, data: _base(layer, data), passes=layer.passes),
        Provider(
            FP32_BASE,
            "frozen layer, fp32",
            lambda case, data: _base(layer, data.to(torch.float32)),
            passes=layer.passes,
        ),
        Provider(LIBRARY, "library", lambda case, data: _step(_pairs(timed, case, data), 0, data), missing),
        Provider(OURS, OURS, lambda case, data: _step(_pairs(timed, case, data), 1, data), missing, gated=True),
    )
    entries = tuple(Entry(*shape, R=(method.rank,), adapter_dtypes=("fp32",)) for shape in layer.shapes)
    return Bench(
        timed.name, {p.name: p for p in providers}, dict.fromkeys(PRESET_DTYPES, entries), layer.data,
        lambda case, preset: [LIBRARY, OURS], functools.partial(_gate, timed), layer.floor, copies,
        finish=functools.partial(_finish, timed),
    )  # fmt: skip


def _missing(library: str) -> str | None:
    here = not library or library in sys.modules or importlib.util.find_spec(library)
    return None if here else f"{library} is not installed (pip install 'peftkern[bench]')"


def _base(layer: Layer, data: Data) -> Step:
    layers = [layer.frozen(*weights) for weights in data.weights]
    leaves = [data.leaves(i) for i in range(len(layers))]
    return Step(lambda i: layers[i](*data.args[i]), leaves, data.dy, [w for each in data.weights for w in each])


class _Pair(NamedTuple):
    """The library's model of one layer and its accelerated copy, and what the layer is called in them."""

    models: tuple[nn.Module, nn.Module]
    name: str


def _pairs(timed: _Timed, case: Case, data: Data) -> list[_Pair]:
    """One for each copy of the data."""
    if case not in data.made:
        data.made[case] = [_pair(timed, case, weights) for weights in data.weights]
    return data.made[case]


def _pair(timed: _Timed, case: Case, weights: tuple[Tensor, ...]) -> _Pair:
    method, layer = timed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock = method.build(layer.frozen(*weights), case.R).to(case.device).train(method.trains)
        for p in stock.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.1)
    if case.dropout:
        _set_dropout(stock, case.dropout)
    # What is frozen is one tensor for both: that of many experts is large.
    ours = copy.deepcopy(stock, {id(p): p for p in stock.parameters() if not p.requires_grad})
    report = peftkern.accelerate(ours)
    if len(report.accelerated) != 1:
        raise RuntimeError(f"its layer is not accelerated: {dict(report.skipped)}")
    return _Pair((stock, ours), report.accelerated[0])


def _accelerated_with_dropout(timed: _Timed) -> bool:
    method, layer = timed
    if not (method.trains and layer.drops):
        return False
    case = Case(timed.name, "cpu", torch.float32, torch.float32, 4, 32, 24, min(method.rank, 8), 0.1)
    model = method.build(layer.frozen(*layer.data(case, 1).weights[0]), case.R).train()
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


def _trained(model: nn.Module) -> list[Tensor]:
    # Of the model: what layers share may not be among the layer's own.
    return [p for p in model.parameters() if p.requires_grad]


def _step(pairs: list[_Pair], which: int, data: Data) -> Step:
    models = [pair.models[which] for pair in pairs]
    layers = [model.get_submodule(pair.name) for model, pair in zip(models, pairs)]
    leaves = [[*data.leaves(i), *_trained(model)] for i, model in enumerate(models)]
    frozen = [t for model in models for t in (*model.parameters(), *model.buffers())]
    return Step(lambda i: layers[i](*data.args[i]), leaves, data.dy, frozen)


def _gate(timed: _Timed, case: Case) -> str | None:
    """Why the accelerated layer's result is wrong, or None: at a small size without dropout, against the library in fp64."""
    small = dataclasses.replace(case, M=48, K=160, N=96, R=min(case.R, 16), dropout=0.0)
    data = timed.layer.data(small, 1)
    pairs, wide = _pairs(timed, small, data), data.to(torch.float64)
    exact = timed.layer.exact(pairs[0].models[0])
    y = exact.get_submodule(pairs[0].name)(*wide.args[0])
    gradients = torch.autograd.grad(y, [*wide.leaves(0), *_trained(exact)], wide.dy[0])
    return peer_check.wrong(_step(pairs, 1, data), [y.detach(), *gradients])


def _finish(timed: _Timed, rows: list[dict]) -> list[dict]:
    """Rows of a block with the method's name, and with the library's time over ours."""
    times = {(r["pass"], r["dropout"]): r["median_ms"] for r in rows if r["provider"] == LIBRARY}
    done = []
    for row in rows:
        theirs, own = times.get((row["pass"], row["dropout"])), row["median_ms"]
        gain = round(theirs / own, 4) if row["provider"] == OURS and theirs and own else None
        done.append(row | {"op": timed.method.op, "method": timed.name, "speed_up": gain})
    return done

"""The benchmark of a method of the registry: the library's own layer, the same layer accelerated, and the frozen linear.

The layer is the one that the method's ``build`` makes around a frozen nn.Linear without a bias, with fp32 adapters that are
all random, whatever the base's dtype. It is in training, or in evaluation where training is not covered. Both layers are
timed without the model around them.
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
from .core.case import Case, Floor, Provider, Step
from .core.floor import layer_floor
from .core.presets import PRESET_DTYPES, Choice, Entry
from .peers import check as peer_check
from .peers.data import BASES, Data, copies, frozen_linear, make_data

SHAPES = ((2048, 4096, 4096), (1280, 1536, 2304))
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
    return [(_bench(found[name]), _choice(found[name], asked)) for name in names or found]


def _choice(method: Method, asked: Choice) -> Choice:
    dropouts = asked.dropouts
    if any(dropouts or ()) and not _accelerated_with_dropout(method):
        dropouts = None
    ranks = asked.ranks if method.rank else None
    return dataclasses.replace(
        asked, dtypes=asked.dtypes or ("fp32",), ranks=ranks, dropouts=dropouts, adapters=("fp32",)
    )


def _bench(method: Method) -> Bench:
    library = (method.layer or "").partition(".")[0]
    missing = functools.partial(_missing, library)
    providers = (
        *BASES,
        Provider(LIBRARY, "library", lambda case, data: _step(_pairs(method, case, data), 0, data), missing),
        Provider(OURS, OURS, lambda case, data: _step(_pairs(method, case, data), 1, data), missing, gated=True),
    )
    entries = tuple(Entry(*shape, R=(method.rank,), adapter_dtypes=("fp32",)) for shape in SHAPES)
    return Bench(
        method.name, {p.name: p for p in providers}, dict.fromkeys(PRESET_DTYPES, entries), make_data,
        lambda case, preset: [LIBRARY, OURS], functools.partial(_gate, method), _floor, copies,
        finish=functools.partial(_finish, method),
    )  # fmt: skip


def _missing(library: str) -> str | None:
    here = not library or library in sys.modules or importlib.util.find_spec(library)
    return None if here else f"{library} is not installed (pip install 'peftkern[bench]')"


def _floor(case: Case, which: str) -> Floor:
    # What a method cannot do without beside the base is the method's own affair: the base alone is less than any.
    return dataclasses.replace(layer_floor(case, which), branch_flops=0.0, branch_bytes=0.0)


class _Pair(NamedTuple):
    """The library's model of one layer and its accelerated copy, and what the layer is called in them."""

    models: tuple[nn.Module, nn.Module]
    name: str


def _pairs(method: Method, case: Case, data: Data) -> list[_Pair]:
    """One for each copy of the data."""
    if case not in data.made:
        data.made[case] = [_pair(method, case, weight) for weight in data.weight]
    return data.made[case]


def _pair(method: Method, case: Case, weight: Tensor) -> _Pair:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock = method.build(frozen_linear(weight), case.R).to(weight.device).train(method.trains)
        for p in stock.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.1)
    if case.dropout:
        _set_dropout(stock, case.dropout)
    ours = copy.deepcopy(stock)
    report = peftkern.accelerate(ours)
    if len(report.accelerated) != 1:
        raise RuntimeError(f"its layer is not accelerated: {dict(report.skipped)}")
    return _Pair((stock, ours), report.accelerated[0])


def _accelerated_with_dropout(method: Method) -> bool:
    model = method.build(nn.Linear(32, 24), min(method.rank, 8)).train()
    return method.trains and _set_dropout(model, 0.1) and bool(peftkern.accelerate(model).accelerated)


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
    leaves = [[x, *_trained(model)] for x, model in zip(data.x, models)]
    frozen = [t for model in models for t in (*model.parameters(), *model.buffers())]
    return Step(lambda i: layers[i](data.x[i]), leaves, data.dy, frozen)


def _gate(method: Method, case: Case) -> str | None:
    """Why the accelerated layer's result is wrong, or None: at a small size without dropout, against the library in fp64."""
    small = dataclasses.replace(case, M=48, K=160, N=96, R=min(case.R, 16), dropout=0.0)
    data = make_data(small, 1)
    pairs = _pairs(method, small, data)
    exact = copy.deepcopy(pairs[0].models[0]).double()
    x = data.x[0].detach().double().requires_grad_()
    y = exact.get_submodule(pairs[0].name)(x)
    gradients = torch.autograd.grad(y, [x, *_trained(exact)], data.dy[0].double())
    return peer_check.wrong(_step(pairs, 1, data), [y.detach(), *gradients])


def _finish(method: Method, rows: list[dict]) -> list[dict]:
    """Rows of a block with the method's name, and with the library's time over ours."""
    times = {(r["pass"], r["dropout"]): r["median_ms"] for r in rows if r["provider"] == LIBRARY}
    done = []
    for row in rows:
        theirs, own = times.get((row["pass"], row["dropout"])), row["median_ms"]
        gain = round(theirs / own, 4) if row["provider"] == OURS and theirs and own else None
        done.append(row | {"op": method.op, "method": method.name, "speed_up": gain})
    return done

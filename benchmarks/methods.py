"""The benchmark of a method of the registry: the library's own code, ours, and a frozen layer.

subjects/ says what both sides are: a layer and its accelerated copy (layer.py, and over a base in 4 or 8 bits quantised.py),
a module of the residual stream and our function (stream.py), or a whole model and its accelerated copy (model.py, llama.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from peftkern.methods import METHODS

from .core.bench import Bench
from .core.case import BASE, FP32_BASE, Case, Provider, Step
from .core.presets import PRESET_DTYPES, Choice
from .layers import Data, layers_of
from .peers import check as peer_check
from .peers.data import copies
from .subjects import llama, model, quantised, stream
from .subjects.layer import LayerSubject
from .subjects.subject import Pair, Subject

LIBRARY, OURS = "library", "peftkern"
FLOOR_FIELDS = ("floor_ratio", "floor_by", "floor_over", "flops_bound_fraction", "bytes_bound_fraction")


def benches(names: Iterable[str], asked: Choice) -> list[tuple[Bench, Choice]]:
    """A benchmark for each of these methods, or for all that have something to time, with what it has of what was asked for.

    Raises ValueError for a name that the registry does not have, or of which nothing is timed.
    """
    found = {name: functools.partial(_on_layers, name) for name, method in METHODS.items() if method.build is not None}
    found |= {name: functools.partial(stream.subjects, name) for name in stream.TIMED}
    found |= {f"{name} in BERT": functools.partial(model.subjects, name) for name in model.TIMED}
    found |= {f"LoRA over {form}": functools.partial(quantised.subjects, form) for form in quantised.KINDS}
    found |= {f"LoRA over {form} in Llama": functools.partial(llama.subjects, form) for form in llama.TIMED}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(f"no method to time is called {', '.join(unknown)}; there are {', '.join(found)}")
    timed = [subject for name in names or found for subject in found[name]()]
    return [(_bench(subject), subject.choice(asked)) for subject in timed]


def _on_layers(name: str) -> list[LayerSubject]:
    return [LayerSubject(METHODS[name], layer) for layer in layers_of(METHODS[name])]


def _bench(subject: Subject) -> Bench:
    layer = subject.layer
    providers = (
        Provider(
            BASE,
            "frozen layer",
            lambda case, data: _base(subject, data),
            passes=layer.passes,
            floor=layer.frozen_floor,
        ),
        Provider(
            FP32_BASE,
            "frozen layer, fp32",
            lambda case, data: _base(subject, data.to(torch.float32)),
            passes=layer.passes,
            floor=layer.frozen_floor,
        ),
        Provider(LIBRARY, "library", lambda case, data: _step(_pairs(subject, case, data), 0, data), subject.missing),
        Provider(
            OURS, OURS, lambda case, data: _step(_pairs(subject, case, data), 1, data), subject.missing, gated=True
        ),
    )
    others = {f"{OURS}_{end}": other for end, other in getattr(subject, "others", {}).items()}
    providers += tuple(_other(*item) for item in others.items())
    return Bench(
        subject.name, {p.name: p for p in providers}, dict.fromkeys(PRESET_DTYPES, subject.entries()), layer.data,
        lambda case, preset: [LIBRARY, OURS, *others], functools.partial(_gate, subject), layer.floor, copies,
        check=functools.partial(_check, others), finish=functools.partial(_finish, subject),
    )  # fmt: skip


def _other(name: str, subject: Subject) -> Provider:
    title = name.replace("_", ", ")
    return Provider(
        name, title, lambda case, data: _step(_pairs(subject, case, data), 1, data), subject.missing,
        floor=subject.layer.floor,
    )  # fmt: skip


def _check(others: dict[str, Subject], provider: Provider, case: Case) -> str | None:
    return _gate(others[provider.name], case) if provider.name in others else None


def _base(subject: Subject, data: Data) -> Step:
    layers = [subject.layer.frozen(*weights) for weights in data.weights]
    leaves = [data.leaves(i)[:1] for i in range(len(layers))]
    frozen = [w for each in data.weights for w in each]
    return Step(lambda i: subject.layer.call(layers[i], data.args[i]), leaves, data.dy, frozen)


def _pairs(subject: Subject, case: Case, data: Data) -> list[Pair]:
    """One for each copy of the data."""
    key = subject.name, case
    if key not in data.made:
        data.made[key] = [subject.pair(case, weights) for weights in data.weights]
    return data.made[key]


def _step(pairs: list[Pair], which: int, data: Data) -> Step:
    leaves = [[*data.leaves(i), *pair.trained[which]] for i, pair in enumerate(pairs)]
    frozen = [t for pair in pairs for t in pair.frozen]
    return Step(lambda i: pairs[i].calls[which](*data.args[i]), leaves, data.dy, frozen)


def _gate(subject: Subject, case: Case) -> str | None:
    """Why our result is wrong, or None: at a small size without dropout, against the library in fp64."""
    small = subject.small(case)
    data = subject.layer.data(small, 1)
    pairs, wide = _pairs(subject, small, data), data.to(torch.float64)
    call, trained = pairs[0].exact()
    y = call(*wide.args[0])
    gradients = torch.autograd.grad(y, [*wide.leaves(0), *trained], wide.dy[0])
    return peer_check.wrong(_step(pairs, 1, data), [y.detach(), *gradients], getattr(subject, "bounds", None))


def _finish(subject: Subject, rows: list[dict]) -> list[dict]:
    """Rows of a block with the method's name, what it is compared with, and the library's time over ours."""
    times = {(r["pass"], r["dropout"]): r["median_ms"] for r in rows if r["provider"] == LIBRARY}
    # Of what computes no layer the layer's floor says nothing; of what does it is the least, without the method's own work.
    floor = {} if subject.on_layer else dict.fromkeys(FLOOR_FIELDS)
    done = []
    for row in rows:
        theirs, own = times.get((row["pass"], row["dropout"])), row["median_ms"]
        gain = round(theirs / own, 4) if row["provider"] == OURS and theirs and own else None
        told = {"op": subject.op, "method": subject.name, "beside": subject.beside, "speed_up": gain}
        done.append(row | told | (floor if row["provider"] in (LIBRARY, OURS) else {}))
    return done

"""The methods that this package serves: one entry each, walked by ``accelerate``, the parity test and the benchmark.

An entry says which layer of a library it stands for, what it reads of such a layer (``held``), and its equation
(``apply``). Importing it imports no library.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..autograd.shapes import autocast_dtype
from ..autograd.shapes import uncast as uncasting
from ..bases.base import Base
from ..dispatch.least import WEIGHT, least_work
from ..many.adapter import Adapter
from ..problem import Problem, problem_like
from ..settings import current
from .entry import Entry
from .linear import Linear, entry, run
from .look import Look
from .stored import Settings, Stored


class Held(NamedTuple):
    """What a layer holds of one active adapter.

    ``tensors``, ``numbers``: as the method's ``held`` read them and its ``apply`` takes them. The first tensor has the
    adapter's dtype. ``rank``: R, 0 without a branch. ``dropout_p``: of the branch's input, 0 outside of training. ``folds``:
    it makes another weight, which no row of a batch can have alone, though the method's other adapters are coefficients.
    """

    name: str
    method: Method
    tensors: tuple[Tensor | None, ...]
    numbers: tuple[Any, ...] = ()
    dropout_p: float = 0.0
    rank: int = 0
    folds: bool = False

    def adapter(self, weight: Tensor, bias: Tensor | None) -> Adapter:
        """What it makes of a layer (N, K), as one entry of a list of adapters."""
        return entry(self.method.apply(Linear(weight, bias), self), bias)


class Kind(Protocol):
    """What a layer is that is not linear: plain values, no tensors."""

    by: str  # who computes it, for reports
    takes_ids: bool

    def start(self, weight: Tensor, bias: Tensor | None) -> Any:
        """The layer without adapters, as its methods' ``apply`` takes it: its ``run`` computes y of x."""

    def refuses(self, plan: Plan, x: Tensor) -> str | None:
        """Why the shape (or the dtype, of ids) of an input does not fit, or None."""

    def nothing(self, weight: Tensor) -> Tensor:
        """An input without rows."""


class Plan(NamedTuple):
    """What a call of a layer computes: its base, to which each adapter in turn applies its method."""

    weight: Tensor | Base  # (N, K) of a linear layer
    bias: Tensor | None
    held: list[Held]
    kind: Kind | None = None  # None of a linear layer
    uncast: bool = False  # whether all of it runs outside of autocast

    def nothing(self) -> Tensor:
        """An input without rows, of the weight's dtype, or of the adapters' on a base that has none."""
        weight = self.weight
        if self.kind is not None:
            return self.kind.nothing(weight)
        if isinstance(weight, Base):
            return torch.empty((0, weight.shape[1]), dtype=self.held[0].tensors[0].dtype, device=weight.device)
        return weight.new_empty((0, weight.shape[1]))

    def least(self) -> int:
        """The elements of x below which the library's own code is faster, on a CPU; 0 if it never is."""
        names = {h.method.name for h in self.held if h.method.loses_small}
        if not names:
            return 0
        now = current()
        if math.prod(self.weight.shape) >= least_work(WEIGHT, now):
            return 0
        return -(-max(least_work(name, now) for name in names) // max(self.weight.shape[0], 1))

    def call(self, rows: int) -> Problem:
        """The call of ``lora_linear`` that a linear layer makes for so many rows."""
        (N, K), held = self.weight.shape, self.held
        present = dict.fromkeys((symbol for h in held for symbol in h.method.coefficients), True)
        present |= {"bias": self.bias, "dropout": any(h.dropout_p for h in held)}
        like = self.nothing()
        if isinstance(self.weight, Base):
            present[self.weight.kind] = True
        sizes = rows, N, K, sum(h.rank for h in held)
        return problem_like(like, "lora_linear", (held[0].tensors[0] if held else like).dtype, sizes, present)

    def run(self, x: Tensor) -> Tensor:
        """y of x, (..., K) of a linear layer."""
        weight, bias, held, kind, uncast = self
        if uncast and autocast_dtype(x) is not None:
            with uncasting(x):
                return self._replace(uncast=False).run(x)
        first = held[0]
        if len(held) == 1 and first.method.alone is not None:
            return first.method.alone(weight, bias, first, x)
        y = Linear(weight, bias) if kind is None else kind.start(weight, bias)
        for adapter in held:
            y = adapter.method.apply(y, adapter)
        result = run(y, x) if kind is None else y.run(x)
        return result.to(x.dtype) if first.method.keeps_dtype else result


_GRADIENTS = frozenset({"need_x", "need_A", "need_B"})


@dataclass(frozen=True, kw_only=True)
class Method(Entry):
    """An entry of the registry for layers that have a weight.

    Attributes, beside those of ``Entry``:
        layer: dotted name of the library's class, whose ``forward`` gets the input first; or of the class whose instance
            says that a layer of another method computes this one for an adapter (``variant``); None without a library.
        of: name of the method whose equation it is on layers of another kind, None for a method of its own. also: further
            classes of layers that it stands for.
        base: look at a layer -> its weight, its bias and its kind, None for linear layers.
        adapters: the layer's dict that has an entry for each adapter; with spaces between, several of which one has.
        held: (look at such a layer, adapter, (N, K)) -> what it holds of the adapter. It reads through the look alone, and
            raises ``NotCovered`` with the reason where the library's own code has to run.
        apply: the equation: (layer so far, adapter) -> layer with this adapter.
        alone: (weight, bias, adapter, x) -> y of a layer with this adapter alone, at once: for a method whose small layers
            would spend their time on the steps between.
        plan: (look, the adapters of a mixed batch or None) -> the plan, for layers that are no tuner of HF PEFT.
        examples: (in_features, out_features) -> models of one such layer each, by what is special about them, with adapters
            that are not zero and without dropout. The parity test compares them with the library's own code.
        inputs: (an example, in_features) -> the inputs that it is compared on, None for (..., K).
        build: (a frozen nn.Linear, or layer of its kind, rank) -> a model of one layer around it as users make it, which the
            benchmark times.
            rank: the one that it takes there, 0 of a method without.
        coefficients: the symbols of the vectors that it uses (peftkern/equation.py).
        routes: whether what a row takes of an adapter depends on the row itself.
        makes: whether lora_A and lora_B are made anew at every call, at more than a copy's cost: of many adapters in a batch
            each would pay it.
        one_active: whether the library's layer computes one of its active adapters alone.
        nests: whether its layer may stand around, or inside, that of another such method (``PeftMixedModel``): it gives its
            input to the layer inside as it is, and adds to what comes back or scales it, but for the bias.
        dense: whether it reads the elements of the weight, so that a quantised base does not do.
        widens: whether the classes in ``also`` put out fp32 for an input in half precision.
        loses_small: whether small calls on a CPU run the library's own code, which is faster there; from how many products M K N
            on the call is ours, tables of CPU models say, by the method's name (dispatch/least.py).
        keeps_dtype: whether the library's layer puts out the dtype of its input under autocast too.
        peft_type: name of the method in an adapter's ``adapter_config.json``. stored: the form of such a checkpoint, of a
            method that ``attach_adapters`` serves.
    """

    layer: str | None
    apply: Callable[[Linear, Held], Linear]
    examples: Callable[[int, int], Mapping[str, nn.Module]] | None = None
    inputs: Callable[[nn.Module, int], list[Tensor]] | None = None
    build: Callable[[nn.Module, int], nn.Module] | None = None
    rank: int = 16
    held: Callable[[Look, str, tuple[int, ...]], Held] | None = None
    of: str | None = None
    also: tuple[str, ...] = ()
    base: Callable[[Look], tuple[Tensor, Tensor | None, Kind]] | None = None
    adapters: str = ""
    alone: Callable[[Tensor, Tensor | None, Held, Tensor], Tensor] | None = None
    plan: Callable[[Look, Iterable[str] | None], Plan] | None = None
    coefficients: tuple[str, ...] = ()
    variant: bool = False
    peft_type: str | None = None
    stored: Stored | None = None
    routes: bool = False
    makes: bool = False
    one_active: bool = False
    nests: bool = False
    dense: bool = False
    widens: bool = False
    loses_small: bool = False
    keeps_dtype: bool = False

    @property
    def mixed(self) -> bool:
        """Whether rows of a batch may have adapters of their own: an adapter is coefficients of a linear layer, which holds
        it by its name."""
        return self.family == "L" and self.of is None and self.plan is None and not (self.routes or self.makes)

    @property
    def folder(self) -> str:
        return self.apply.__module__.rpartition(".")[0]

    @property
    def flags(self) -> tuple[frozenset[str], frozenset[str]]:
        forward = frozenset(self.coefficients)
        return forward, forward | _GRADIENTS | {f"need_{symbol}" for symbol in forward}

    @property
    def serves_many(self) -> bool:
        return self.mixed or self.stored is not None

    @property
    def layers(self) -> tuple[str, ...]:
        """The dotted names of all classes that it stands for."""
        return () if self.layer is None else (self.layer, *self.also)


METHODS: dict[str, Method] = {}  # by name
_LAYERS: dict[str, Method] = {}  # by the dotted name of the layer, or of the variant


def register(method: Method) -> Method:
    """Add a method. Raises ValueError if its name or its layer is taken."""
    taken = [METHODS.get(method.name), *map(_LAYERS.get, method.layers)]
    other = next(filter(None, taken), None)
    if other is not None:
        raise ValueError(f"{method.layer or method.name} is {other.name}'s already")
    METHODS[method.name] = method
    _LAYERS.update(dict.fromkeys(method.layers, method))
    return method


def unregister(method: Method) -> None:
    """Take a method out again."""
    del METHODS[method.name]
    for layer in method.layers:
        del _LAYERS[layer]


def loaded(dotted: str | None) -> type | None:
    """The class of this dotted name if its module has been imported, else None."""
    module, _, name = (dotted or "").rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _of(cls: type) -> Method | None:
    name = f"{cls.__module__}.{cls.__qualname__}"
    method = _LAYERS.get(name)
    return method if method is not None and loaded(name) is cls else None


def method_of(cls: type) -> Method | None:
    """The method whose layer is exactly this class: a subclass may compute anything."""
    method = _of(cls)
    return None if method is None or method.variant else method


def variant_of(cls: type) -> Method | None:
    """The method that an instance of exactly this class makes of an adapter."""
    method = _of(cls)
    return method if method is not None and method.variant else None


def layers() -> list[tuple[type, Method]]:
    """The classes of layers that are loaded, with their methods."""
    found = ((loaded(name), m) for m in METHODS.values() if not m.variant for name in m.layers)
    return [(cls, method) for cls, method in found if cls is not None]


def checkpoint_types() -> list[str]:
    """The ``peft_type`` of the checkpoints whose form is known."""
    return sorted({m.peft_type for m in METHODS.values() if m.stored is not None})


def stored_as(settings: Settings) -> Method | None:
    """The method of a checkpoint with these settings, if its form is known."""
    known = [m for m in METHODS.values() if m.stored is not None and m.peft_type == settings.get("peft_type")]
    for method in known:
        if method.stored.switch is not None and settings.get(method.stored.switch):
            return method
    return next((method for method in known if method.stored.switch is None), None)

"""The methods that this package serves: one entry each, walked by ``accelerate``, the parity test and the benchmark.

An entry says which layer of a library it stands for, what that layer computes (``plan``) and who computes it (``run``).
Importing it imports no library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor, nn

from .look import Look

NO_SCALES: Mapping[str, Tensor] = MappingProxyType({})


class Branch(NamedTuple):
    """One active adapter of a layer.

    ``scales``: its scale vectors by the names that ``lora_linear`` has for them.
    """

    name: str
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    dropout_p: float  # 0 outside of training
    scales: Mapping[str, Tensor] = NO_SCALES


class Plan(NamedTuple):
    """A layer whose forward is y = x W^T + bias + sum of branches, or, in a mixed batch, the branch of each row."""

    weight: Tensor  # (N, K)
    bias: Tensor | None
    branches: list[Branch]


@dataclass(frozen=True)
class Method:
    """An entry of the registry.

    Attributes:
        name: as its paper calls it. taxonomy: additive, selective, reparameterised or hybrid. family: of the kernels that
            serve it (L: a GEMM and a linear branch).
        layer: dotted name of the library's class, whose ``forward`` gets the input first.
        plan: the look at such a layer, and the adapters of a mixed batch or None -> what it computes. It reads through the
            look alone, and raises ``NotCovered`` with the reason where the library's own code has to run.
        run: (layer, plan, x) -> y.
        examples: (in_features, out_features) -> models of one such layer each, by what is special about them, with adapters
            that are not zero and without dropout. The parity test compares them with the library's own code.
        build: (a frozen nn.Linear, rank) -> a model of one layer around it as users make it, which the benchmark times.
            rank: the one that it takes there, 0 of a method without.
        op: the op that ``run`` calls. mixed: whether rows of a batch may have adapters of their own.
        saves: what backward keeps. merges: how the adapter goes into the weight.
        peft_type: name of the method in an adapter's ``adapter_config.json``.
        tested: library -> the oldest and the newest release that the tests know, as (major, minor).
    """

    name: str
    taxonomy: str
    family: str
    layer: str
    plan: Callable[[Look, Iterable[str] | None], Plan]
    run: Callable[[nn.Module, Plan, Tensor], Tensor]
    examples: Callable[[int, int], Mapping[str, nn.Module]]
    op: str
    saves: str
    merges: str
    tested: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]
    build: Callable[[nn.Linear, int], nn.Module] | None = None
    rank: int = 16
    rank: int = 16
    peft_type: str | None = None
    mixed: bool = False


METHODS: dict[str, Method] = {}  # by the dotted name of the layer


def register(method: Method) -> Method:
    """Add a method. Raises ValueError if its layer has one already."""
    if method.layer in METHODS:
        raise ValueError(f"{method.layer} is {METHODS[method.layer].name}'s already")
    METHODS[method.layer] = method
    return method


def loaded(dotted: str) -> type | None:
    """The class of this dotted name if its module has been imported, else None."""
    module, _, name = dotted.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def method_of(cls: type) -> Method | None:
    """The method whose layer is exactly this class: a subclass may compute anything."""
    method = METHODS.get(f"{cls.__module__}.{cls.__qualname__}")
    return method if method is not None and loaded(method.layer) is cls else None


def checkpoint_types() -> list[str]:
    """The ``peft_type`` of the adapters that rows of a batch may have each their own of."""
    return [method.peft_type for method in METHODS.values() if method.mixed and method.peft_type is not None]

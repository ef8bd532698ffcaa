"""A base: the kind of a frozen weight and the tensors that hold it.

A kind says its (N, K), checks its tensors against an input, casts them as autocast does, and states its weight in plain
torch (``dequantise``): the definition that every back end's loader of this kind is held to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .codebook import FP4, NF4, Codebook
from .dense import Dense
from .fp8 import Fp8
from .gguf import Q4, Q8
from .identity import Identity
from .int4 import Halves4, Int4
from .int8 import Int8, W8a8
from .library import held
from .mxfp4 import Mxfp4


class Kind(Protocol):
    """One way to hold a frozen weight. ``name`` is what ops call it; ``sized``: whether its tensors tell (N, K) themselves."""

    name: str
    sized: bool

    def check(self, tensors: Sequence[Tensor], like: Tensor, K: int | None, N: int | None) -> tuple[int, int]:
        """(N, K), or a ValueError or TypeError that names what does not fit. ``like``: of the dtype and device wanted.

        K, N: what is known of them from elsewhere, None for what only the tensors can tell.
        """

    def cast(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The tensors as they meet an activation of this dtype under autocast."""

    def dequantise(self, tensors: Sequence[Tensor], dtype: torch.dtype, shape: tuple[int, int]) -> Tensor | None:
        """W of ``shape`` (N, K) in ``dtype``; None if the base hands its input on."""


_ALL = (
    Dense(), Identity(), Codebook("nf4", NF4), Codebook("fp4", FP4), Int8(), W8a8(), Int4(), Halves4("hqq4", True),
    Halves4("quanto4", False), Fp8(), Mxfp4(), Q4(), Q8(),
)  # fmt: skip
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
# Those in codes of 4 or 8 bits.
QUANTISED = frozenset(KINDS) - {"dense", "identity"}


class Base(NamedTuple):
    """What a public function takes where it takes a weight. ``shape``: (N, K), where whoever made it knows."""

    kind: str
    tensors: tuple[Tensor, ...]
    shape: tuple[int, int] | None = None

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.tensors[0].device


# The residual stream: Base(x) = x.
IDENTITY = Base("identity", ())


def base_of(weight: Tensor | Base) -> Base:
    """A tensor (N, K) as a dense base, a library's quantised weight as what it is (library.py), a base as it is.

    Raises TypeError for anything else, ValueError for a library's weight that no kind is.
    """
    if type(weight) is Tensor or type(weight) is torch.nn.Parameter:
        return Base("dense", (weight,))
    if isinstance(weight, Base):
        for i, t in enumerate(weight.tensors):
            if not isinstance(t, Tensor):
                raise TypeError(f"{weight.kind}[{i}] must be a tensor, got {type(t).__name__}")
        return weight
    quantised = held(weight)
    if quantised is not None:
        return Base(*quantised)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    return Base("dense", (weight,))


def check_shape(base: Base, N: int, K: int, by: str) -> None:
    """Raise ValueError if the base has as many elements as (N, K) but another shape. ``by``: the arguments that tell N and K.

    The tensors of a kind that is not ``sized`` fit both. Of other numbers the ops say which tensor does not fit.
    """
    shape = base.shape
    if shape is not None and (shape[0] != N or shape[1] != K) and shape[0] * shape[1] == N * K:
        raise ValueError(
            f"weight is a base of kind {base.kind} and shape {tuple(shape)}, but {by} are for (N, K) = {(N, K)}"
        )


def computed_in(base: Base, compute: str | None) -> Base:
    """The base whose products are computed in ``compute``: "int8", of kind int8 alone, or None, as it is.

    Raises ValueError for another one.
    """
    if compute is None:
        return base
    if compute != "int8":
        raise ValueError(f"compute is {compute!r}, expected 'int8' or None")
    if base.kind not in ("int8", "w8a8"):
        raise ValueError(f"compute='int8' is for weights of kind int8, this one is {base.kind}")
    return base._replace(kind="w8a8")


def operands(
    kind: str, tensors: Sequence[Tensor], t: Tensor, shape: tuple[int, int], transposed: bool
) -> tuple[Tensor, Tensor | None]:
    """(t', W'), in t's dtype: a base of ``shape`` (N, K) makes t' W'^T of t (M, K); if ``transposed``, t' W' of t (M, N).

    W' is None if the base hands its input on. t is in fp32 or fp64.
    """
    of = kind_of(kind)
    return of.operands(tensors, t, transposed) if isinstance(of, W8a8) else (t, of.dequantise(tensors, t.dtype, shape))


def kind_of(name: str) -> Kind:
    """The kind of that name. Raises ValueError for one that there is not."""
    if name not in KINDS:
        raise ValueError(f"kind is {name!r}, expected one of {', '.join(KINDS)}")
    return KINDS[name]

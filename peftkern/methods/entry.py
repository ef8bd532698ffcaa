"""What the registry says of any method, whatever it acts on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

# Library -> the oldest and the newest release, as (major, minor).
Tested = Mapping[str, tuple[tuple[int, int], tuple[int, int]]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An entry of the registry, as documents show it.

    Attributes:
        name: as its paper calls it. taxonomy: additive, selective, reparameterised or hybrid. family: of the kernels that
            serve it (L: a GEMM and a linear branch; B: an activation in a branch on the residual; R: the same on listed rows).
        op: the op that computes it, or the function, if that is torch's own operations alone.
        saves: what backward keeps. merges: how the adapter goes into the weight.
        function: the functional form, for those who have no library. trains: whether training is covered.
        tested: the releases of libraries that the tests know.
    """

    name: str
    taxonomy: str
    family: str
    op: str
    saves: str
    merges: str
    function: Callable[..., Tensor] | None = None
    trains: bool = True
    tested: Tested = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The package that it belongs to, whose docstring says what such an adapter is."""
        raise NotImplementedError

    @property
    def flags(self) -> tuple[frozenset[str], frozenset[str]]:
        """Those of a Problem of its op: a forward pass, and a backward pass with all gradients."""
        raise NotImplementedError

    @property
    def serves_many(self) -> bool:
        """Whether a batch may mix such adapters."""
        raise NotImplementedError

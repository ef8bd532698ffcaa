"""Methods of the residual stream: they act on h and on no layer, so there is no weight to fold and no base to read.

A ``StreamMethod`` stands beside ``Method`` in the coverage table. peftkern/testing/residual holds the modules of libraries
that it is compared with and timed beside.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..entry import Entry


@dataclass(frozen=True, kw_only=True)
class StreamMethod(Entry):
    """An entry of the registry without a layer.

    Attributes:
        options, gradients: what a forward pass is given, and what a backward pass is asked for, as flags of its op's Problem;
            empty if the op is torch's operations.
        many: whether a batch may mix such adapters.
    """

    options: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()
    many: bool = False

    @property
    def folder(self) -> str:
        return __name__.rpartition(".")[0]

    @property
    def flags(self) -> tuple[frozenset[str], frozenset[str]]:
        return self.options, self.options | self.gradients

    @property
    def serves_many(self) -> bool:
        return self.many


STREAM: dict[str, StreamMethod] = {}  # by name


def register(method: StreamMethod) -> StreamMethod:
    """Add a method. Raises ValueError if its name is taken."""
    if method.name in STREAM:
        raise ValueError(f"there is a {method.name} already")
    STREAM[method.name] = method
    return method

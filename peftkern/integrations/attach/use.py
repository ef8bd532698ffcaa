"""How callers name the adapters of a batch: a block (``MultiLoRA.use``), or a model that enters one at every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from .request import refuse_generators

Names = tuple[str | None, ...]


class Use:
    """The block of ``MultiLoRA.use``, to be entered once; ``as`` gives ``multi``."""

    def __init__(self, multi: Any, block: AbstractContextManager):
        self._multi, self._block = multi, block

    def __enter__(self) -> Any:
        refuse_generators()
        self._block.__enter__()
        return self._multi

    def __exit__(self, *error) -> None:
        self._block.__exit__(*error)


class BoundModel:
    """A model with the adapters of a batch, from ``MultiLoRA.bind``: each call enters and leaves by itself.

    Attributes:
        model, names, repeats: as given to ``bind``.
    """

    def __init__(self, model: nn.Module, names: Names, repeats: int, begin: Callable[[], AbstractContextManager]):
        self.model, self.names, self.repeats, self._begin = model, names, repeats, begin

    def __call__(self, *args, **kwargs) -> Any:
        """A call of the model."""
        with self._begin():
            return self.model(*args, **kwargs)

    def generate(self, *args, **kwargs) -> Any:
        """The model's ``generate``."""
        with self._begin():
            return self.model.generate(*args, **kwargs)


def named(names: Any) -> Names:
    """The names as a tuple; one name, or None, stands for all rows. TypeError for anything else than a list of them."""
    if names is None or isinstance(names, str):
        return (names,)
    if not isinstance(names, Sequence):
        raise TypeError(
            f"names must be a list with one name or None per sequence, or one name, got {type(names).__name__}"
        )
    return tuple(names)


def checked_repeats(repeats: int | None) -> int:
    """``repeats``; 1 for None. ValueError unless it is a number of rows of at least 1."""
    if repeats is None:
        return 1
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats is {repeats!r}, expected a number of rows of at least 1")
    return repeats

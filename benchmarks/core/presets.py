"""What a run measures: the entries of a preset, and what the command line puts in the place of their fields."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from peftkern.problem import DTYPES

from .case import Case

# dtypes of the activations, where they are not asked for.
PRESET_DTYPES = {"quick": ("fp32", "bf16"), "full": ("fp32", "bf16"), "gpu": ("bf16",)}
# With many adapters a case is training from this many rows on, with both passes; below, decoding.
TRAINING_ROWS = 257


@dataclass(frozen=True)
class Entry:
    """One size, with every combination of the lists. M rows, K in_features, N out_features, R ranks (the largest, if they
    are mixed); ``adapter_dtypes``: ``same`` as the activations, or a name; ``dtypes`` of activations that it is for.
    ``adapters``, ``mix``, ``base_share`` and ``ranks`` as those of a Case with many adapters."""

    M: int
    K: int = 4096
    N: int = 4096
    R: tuple[int, ...] = (16,)
    adapter_dtypes: tuple[str, ...] = ("same",)
    dropouts: tuple[float, ...] = (0.0,)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    adapters: int | None = None
    mix: str = "uniform"
    base_share: float = 0.0
    ranks: str = "same"


@dataclass(frozen=True)
class Choice:
    """What was asked for instead of an entry's own: every combination of the lists; None leaves the field as it is.
    ``adapters`` are dtypes (``fp32``, ``same`` or a name), ``ranks`` the largest rank, ``rank_kinds`` ``same`` or ``mixed``."""

    dtypes: Sequence[str] | None = None
    shapes: Sequence[tuple[int, int, int]] | None = None
    ranks: Sequence[int] | None = None
    dropouts: Sequence[float] | None = None
    adapters: Sequence[str] | None = None
    counts: Sequence[int] | None = None
    mixes: Sequence[str] | None = None
    base_shares: Sequence[float] | None = None
    rank_kinds: Sequence[str] | None = None


def cases(op: str, entries: Iterable[Entry], device: str, dtypes: Iterable[str], choice: Choice) -> list[Case]:
    """The cases of a preset, each once."""
    found = [
        case for name in choice.dtypes or dtypes for entry in entries if name in entry.dtypes
        for case in _of(op, entry, device, DTYPES[name], choice)
    ]  # fmt: skip
    return list(dict.fromkeys(found))


def _of(op: str, entry: Entry, device: str, dtype: torch.dtype, choice: Choice) -> Iterable[Case]:
    def lists(*pairs):
        return ([own] if asked is None else asked for asked, own in pairs)

    shapes, many = choice.shapes or [(entry.M, entry.K, entry.N)], entry.adapters is not None
    population = lists(
        (choice.counts, entry.adapters), (choice.mixes, entry.mix), (choice.base_shares, entry.base_share),
        (choice.rank_kinds, entry.ranks),
    )  # fmt: skip
    kinds = {dtype if a == "same" else DTYPES[a] for a in choice.adapters or entry.adapter_dtypes}
    adapters = sorted(kinds & {torch.float32, dtype}, key=lambda d: -d.itemsize)
    dropouts = entry.dropouts if choice.dropouts is None else choice.dropouts
    for shape, R, *more in itertools.product(shapes, choice.ranks or entry.R, *(population if many else ())):
        phase = ("training" if shape[0] >= TRAINING_ROWS else "decode") if many else None
        for adapter, dropout in itertools.product(adapters, (0.0,) if phase == "decode" else dropouts):
            yield Case(op, device, dtype, adapter, *shape, R, dropout, *more, *([phase] if many else []))

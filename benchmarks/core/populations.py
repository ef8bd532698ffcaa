"""Which adapter each row of a batch takes, and which rank each adapter has.

Populations, as punica's benchmark names them, for a number of adapters that is given:

    distinct    neighbours differ: rows take the adapters in turn, so with as many adapters as rows each has its own
    uniform     the same number of rows each
    sorted      the same, rows of one adapter side by side: a prefill of sequences
    zipf        the k-th adapter as often as 1 / k
    identical   all rows take the first; the others are listed, and idle
    skewed      nine rows in ten take the first, the others share the rest evenly

``base_share`` of the rows, spread evenly, take the base alone (-1). But for ``distinct`` and ``sorted``, rows are in
random order: each adapter's are all over the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIXES = ("distinct", "uniform", "sorted", "zipf", "identical", "skewed")
RANKS = ("same", "mixed")
# Parts of the largest rank that mixed adapters take in turn; the last but one leaves odd ranks.
_PARTS = (1.0, 0.5, 0.25, 0.3, 0.125)


def shares(mix: str, adapters: int) -> list[float]:
    """The share of the rows that each adapter is to have."""
    if mix in ("distinct", "uniform", "sorted"):
        weights = [1.0] * adapters
    elif mix == "zipf":
        weights = [1.0 / (k + 1) for k in range(adapters)]
    elif mix == "identical":
        weights = [1.0] + [0.0] * (adapters - 1)
    elif mix == "skewed":
        weights = [0.9] + [0.1 / max(adapters - 1, 1)] * (adapters - 1)
    else:
        raise ValueError(f"mix is {mix!r}, expected one of {', '.join(MIXES)}")
    total = sum(weights)
    return [w / total for w in weights]


def adapter_ids(mix: str, adapters: int, rows: int, base_share: float) -> Tensor:
    """int32 (rows): the same for the same arguments."""
    counts = _apportion(shares(mix, adapters), rows - round(base_share * rows))
    if mix == "distinct":
        taken = torch.arange(sum(counts), dtype=torch.int32) % adapters
    else:
        taken = torch.repeat_interleave(torch.arange(adapters, dtype=torch.int32), torch.tensor(counts))
        if mix != "sorted":
            taken = taken[torch.randperm(taken.numel(), generator=torch.Generator().manual_seed(0))]
    ids = torch.full((rows,), -1, dtype=torch.int32)
    # Row floor(i rows / n) for the i-th of n: apart from each other, whatever the share.
    ids[torch.arange(taken.numel()) * rows // max(taken.numel(), 1)] = taken
    return ids


def adapter_ranks(ranks: str, R: int, adapters: int) -> tuple[int, ...]:
    """Rank of each adapter: R, or parts of it in turn; the first has R."""
    if ranks == "same":
        return (R,) * adapters
    if ranks != "mixed":
        raise ValueError(f"ranks is {ranks!r}, expected one of {', '.join(RANKS)}")
    return tuple(max(1, int(R * _PARTS[i % len(_PARTS)])) for i in range(adapters))


def _apportion(parts: list[float], total: int) -> list[int]:
    # Largest remainders: whole numbers that add up, each within one of its part.
    counts = [int(p * total) for p in parts]
    order = sorted(range(len(parts)), key=lambda i: counts[i] - parts[i] * total)
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts

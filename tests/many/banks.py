"""Small banks, and the list that each was made of."""

from __future__ import annotations

import torch

from peftkern import AdapterBank

K, N = 20, 13


def adapter(rank: int, seed: int, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rank, K, generator=g).to(dtype), torch.randn(N, rank, generator=g).to(dtype)


def bank_of(*ranks: int, max_adapters: int = 4, **kw):
    bank = AdapterBank(K, N, max_adapters=max_adapters, max_rank=8, **kw)
    listed = [(*adapter(r, i), 0.5 + i) for i, r in enumerate(ranks)]
    for i, entry in enumerate(listed):
        bank.add(f"a{i}", *entry)
    return bank, listed

"""Prefix tuning: attention over trained keys and values before those of the sequence.

    softmax over [P; K] of [V_p; V] = (e^lp o_p + e^l o) / (e^lp + e^l)

o_p and o: attention over each part alone, lp and l: the logarithms of its sums of exponentials. So a prefix that all
sequences share is read where it lies: no copy of it for each of them, none of the keys and values behind it, and the
sequence's part stays causal by itself. There is nothing to fuse beyond what attention kernels do, which return l as well. A
second softmax with a gate (LLaMA-Adapter) is another function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(o (..., T, D), lse (..., T)) of q (..., T, D), k and v (..., S, D). ``mask``: True where a key counts."""
    scores = q @ k.mT * (1.0 / math.sqrt(q.shape[-1]))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    # A query without a key: nothing, not NaN.
    weights = (scores - lse.unsqueeze(-1).nan_to_num(neginf=0.0)).exp()
    return weights @ v, lse


def merged(o: Tensor, lse: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """What ``attention`` gives for the keys of both parts."""
    both = torch.logaddexp(lse, lse2)
    share, share2 = ((part - both).exp().unsqueeze(-1) for part in (lse, lse2))
    return o * share + o2 * share2, both


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], is_causal: bool = False) -> Tensor:
    """``scaled_dot_product_attention`` over the prefix's keys and values and those of the sequence, (B, heads, T, D).

    Args:
        q, k, v: (B, heads, T, D). prefix: keys and values (heads, P, D), or (B, heads, P, D).
        is_causal: of the sequence's own keys; every query reads the whole prefix.
    """
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril() if is_causal else None
    return merged(*attention(q, *prefix), *attention(q, k, v, mask))[0]

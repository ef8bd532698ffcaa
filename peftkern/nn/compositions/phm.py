"""Compacter's matrices (Mahabadi et al. 2021): a sum of Kronecker products, made once a step and then used like any other.

    weight = (sum_i kron(rule_i, W_i))^T           rule (n, n, n)     W (n, K / n, N / n)     weight (N, K)

Compacter is a bottleneck adapter whose ``down`` and ``up`` are such weights, Compacter++ one behind the feed-forward part alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

Factor = Tensor | tuple[Tensor, Tensor]


def _product(factor: Factor) -> Tensor:
    return factor if isinstance(factor, Tensor) else torch.bmm(*factor)


def phm_weight(rule: Factor, W: Factor) -> Tensor:
    """The weight (N, K) of a layer that AdapterHub's ``PHMLayer`` is: y = x weight^T.

    Args:
        rule: (n, n, n), or its factors (n, n, 1) and (n, 1, n), which all layers may share.
        W: (n, K / n, N / n), or its factors (n, K / n, r) and (n, r, N / n).

    Differentiable; nothing larger than the weight is made. Raises ValueError for other shapes.
    """
    rule, W = _product(rule), _product(W)
    n = len(rule)
    if rule.shape != (n, n, n) or W.dim() != 3 or len(W) != n:
        raise ValueError(
            f"rule and W have shapes {tuple(rule.shape)} and {tuple(W.shape)}, expected (n, n, n) and (n, K / n, N / n)"
        )
    k, m = W.shape[1:]
    return torch.einsum("iab,ikm->bmak", rule, W).reshape(n * m, n * k)

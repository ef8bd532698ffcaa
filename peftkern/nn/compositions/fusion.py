"""AdapterFusion (Pfeiffer et al. 2021): attention of a token over the outputs of several adapters.

    q = x Wq^T + bq     p = softmax_a(drop(q . (Wk v_a + bk)) / temperature)     y = residual + sum_a p_a Wv v_a

v_a are the adapters' outputs. Their keys and values need no product of their own: q . (Wk v_a + bk) = (q Wk) . v_a + q . bk, and
Wv goes behind the sum. So three products of M rows do, whatever the number A of adapters, where the formula has 1 + 2 A.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class FusionWeights(NamedTuple):
    """Wq, bq, Wk, bk, Wv of AdapterHub's ``BertFusion``; None for a projection that is left out."""

    query: Tensor | None = None
    query_bias: Tensor | None = None
    key: Tensor | None = None
    key_bias: Tensor | None = None
    value: Tensor | None = None


def adapter_fusion(
    x: Tensor,
    outputs: Tensor,
    residual: Tensor,
    weights: FusionWeights,
    *,
    temperature: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """(..., H): the equation above.

    Args:
        x: (..., H), what asks. outputs: (..., A, H), one row for each adapter. residual: (..., H).
        weights: matrices (H, H) and biases (H). temperature: divides the scores.
        dropout_p: drop probability of scores, acts if ``training``, by torch's own generator.
    """
    q = x if weights.query is None else F.linear(x, weights.query, weights.query_bias)
    asks = q if weights.key is None else q @ weights.key
    scores = (outputs @ asks.unsqueeze(-1)).squeeze(-1)
    if weights.key_bias is not None:
        scores = scores + (q @ weights.key_bias).unsqueeze(-1)
    shares = torch.softmax(F.dropout(scores, dropout_p, training) / temperature, -1)
    mixed = (shares.unsqueeze(-2) @ outputs).squeeze(-2)
    return residual + (mixed if weights.value is None else F.linear(mixed, weights.value))

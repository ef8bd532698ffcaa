"""One step of wavelet synthesis along the last axis.

    y[2 i + j - (L - 2)] += low[i] * g_0[j] + high[i] * g_1[j],    j < L

of P / 2 low and P / 2 high coefficients, with filters of even length L; y has P + 2 - L numbers.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def synthesis(coefficients: Tensor, filters: Tensor) -> Tensor:
    """y (m, P + 2 - L) of coefficients (m, P), the low ones first, and filters (2, L)."""
    (m, P), L = coefficients.shape, filters.shape[1]
    if L == 2:  # nothing overlaps: pairs of numbers
        return (coefficients.view(m, 2, P // 2).transpose(1, 2) @ filters).flatten(1)
    return F.conv_transpose1d(coefficients.view(m, 2, P // 2), filters[:, None], stride=2, padding=L - 2).squeeze(1)

"""The Cayley transform of skew-symmetric matrices by its series, as OFT has it.

    R = c_0 I + c_1 Q + ... + c_n Q^n,      Q = U - U^T

U (G, b, b) is upper triangular and given by its elements above the diagonal. One function, since the matrices are so
small that a graph of the single steps would take longer than their arithmetic. With S = Q^2, which is symmetric, it takes
half of the products:

    R = T_0,   T_k = c_2k I + c_(2k+1) Q + S T_(k+1)

Saved for backward: Q, S and all T but R.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import accumulate_dtype
from .saved import first_only
from .shapes import autocast_dtype, cast


def skew(upper: Tensor, rows: Tensor, cols: Tensor, size: int) -> Tensor:
    """Q (G, b, b) with these elements (G, b (b - 1) / 2) above the diagonal, at ``rows`` and ``cols``."""
    U = upper.new_zeros((upper.shape[0], size * size))
    U = U.index_copy(1, torch.add(cols, rows, alpha=size), upper).view(-1, size, size)
    return U - U.transpose(1, 2)


def _term(constant: float, linear: float, Q: Tensor) -> Tensor:
    T = Q * linear
    T.diagonal(dim1=1, dim2=2).add_(constant)
    return T


class NeumannFunction(torch.autograd.Function):
    """R of the elements of U. ``pairs``: (c_0, c_1), (c_2, c_3), ..., two at least; ``last``: what follows them, c_n."""

    @staticmethod
    def forward(ctx, upper, rows, cols, size, pairs, last):
        Q = skew(cast(upper, accumulate_dtype(upper.dtype)), rows, cols, size)
        S = torch.bmm(Q, Q)
        found = [_term(*pairs[-1], Q).add_(S, alpha=last)]
        for pair in reversed(pairs[:-1]):
            found.append(_term(*pair, Q).add_(torch.bmm(S, found[-1])))
        ctx.save_for_backward(rows, cols, Q, S, *found[:-1])
        ctx.c = pairs, last
        ctx.dtype = upper.dtype
        return found[-1]

    @staticmethod
    @first_only("neumann")
    def backward(ctx, d):
        rows, cols, Q, S, *found = ctx.saved_tensors
        pairs, last = ctx.c
        dQ, dS = d * pairs[0][1], None  # d: of the T at hand
        for T, (_, linear) in zip(reversed(found), pairs[1:], strict=True):
            step = torch.bmm(d, T.transpose(1, 2))
            dS = step if dS is None else dS.add_(step)
            d = torch.bmm(S, d)
            dQ.add_(d, alpha=linear)
        dS.add_(d, alpha=last)
        # Of Q^T dS + dS Q^T, too, what counts is twice the part that is skew-symmetric.
        dQ.sub_(torch.bmm(Q, dS + dS.transpose(1, 2)))
        at = torch.add(cols, rows, alpha=Q.shape[-1])
        dQ = (dQ - dQ.transpose(1, 2)).flatten(1).index_select(1, at)
        return cast(dQ, ctx.dtype), *[None] * 5


def neumann(upper: Tensor, rows: Tensor, cols: Tensor, size: int, c: Sequence[float]) -> Tensor:
    """R (G, b, b) in fp32 (fp64 for fp64), under autocast too.

    Args:
        upper: (G, b (b - 1) / 2). rows, cols: int64, where its elements are in U. size: b. c: c_0, c_1, ...
    """
    c = (*c, *[0.0] * max(4 - len(c), 0))
    pairs, last = tuple(zip(c[::2], c[1::2])), c[-1] if len(c) % 2 else 0.0
    with torch.autocast(upper.device.type, enabled=False) if autocast_dtype(upper) else contextlib.nullcontext():
        return NeumannFunction.apply(upper, rows, cols, size, pairs, last)

"""The entrywise product of two matrices of low rank, which is a change of a weight.

    D = s (P Q) * (U V)        dP = T Q^T, dQ = P^T T with T = s dD * (U V), and the other way round

Saved for backward: the factors alone; the two products are made again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import accumulate_dtype
from ..saved import first_only, read_saved
from ..shapes import cast, uncast


class HadamardFunction(torch.autograd.Function):
    """D (N, K) of factors in one dtype, with their gradients."""

    @staticmethod
    def forward(ctx, P, Q, U, V, scaling):
        ctx.save_for_backward(P, Q, U, V, scaling if isinstance(scaling, Tensor) else None)
        ctx.scaling = None if isinstance(scaling, Tensor) else scaling
        return (P @ Q).mul_(U @ V).mul_(scaling)

    @staticmethod
    @first_only("loha_linear")
    def backward(ctx, dD):
        names = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "scaling"
        (P, Q, U, V, s), needs = read_saved(ctx, "loha_linear", lambda: names, lambda n: (True,) * 5)
        dD = dD * (ctx.scaling if s is None else s)
        dP = dQ = dU = dV = None
        if needs[0] or needs[1]:
            T = (U @ V).mul_(dD)
            dP, dQ = (T @ Q.t() if needs[0] else None), (P.t() @ T if needs[1] else None)
        if needs[2] or needs[3]:
            T = torch.mul(dD, P @ Q)
            dU, dV = (T @ V.t() if needs[2] else None), (U.t() @ T if needs[3] else None)
        return dP, dQ, dU, dV, None


def hadamard(P: Tensor, Q: Tensor, U: Tensor, V: Tensor, scaling: float | Tensor = 1.0) -> Tensor:
    """scaling * (P Q) * (U V), (N, K) in fp32 (fp64 for fp64), under autocast too.

    P: (N, R). Q: (R, K). U: (N, S). V: (S, K). scaling: a number, or a tensor of one that gets no gradient.
    """
    with uncast(P):
        return HadamardFunction.apply(*(cast(t, accumulate_dtype(t.dtype)) for t in (P, Q, U, V)), scaling)

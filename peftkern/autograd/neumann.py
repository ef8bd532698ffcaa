"""The Cayley transform of skew-symmetric matrices by its series, as OFT has it.

    R = c_0 I + c_1 Q + ... + c_n Q^n,      Q = U - U^T

U (G, b, b) is upper triangular and given by its elements above the diagonal. One function, since the matrices are so
small that a graph of the single steps would take longer than their arithmetic. With S = Q^2, which is symmetric, it takes
half of the products:

    R = T_0,   T_k = c_2k I + c_(2k+1) Q + S T_(k+1)

Saved for backward: Q, S and all T but R; where a C++ kernel computes it (csrc/cpu/rotate/series.cpp), a copy of the elements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.cpu import call as native
from ..checks import accumulate_dtype
from ..dispatch.watch import nobody_watches
from ..settings import current
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


def _native(upper: Tensor, *args) -> Tensor | None:
    # R, or with a gradient of R that of ``upper``, of a call that is the C++ kernel's; else None.
    ours = nobody_watches() and current().backend in ("auto", "cpu")
    return native.skew_series(torch.get_num_threads(), upper, *args) if ours else None


def _terms(
    upper: Tensor, rows: Tensor, cols: Tensor, size: int, c: tuple[float, ...]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    # Q, S, and all T, the last first.
    Q = skew(upper, rows, cols, size)
    S = torch.bmm(Q, Q)
    found = [_term(c[-3], c[-2], Q).add_(S, alpha=c[-1])]
    for k in range(len(c) - 5, -1, -2):
        found.append(_term(c[k], c[k + 1], Q).add_(torch.bmm(S, found[-1])))
    return Q, S, found


class NeumannFunction(torch.autograd.Function):
    """R of the elements of U. ``c``: c_0, c_1, ..., five at least and an odd number of them."""

    @staticmethod
    def forward(ctx, upper, rows, cols, size, c):
        given = cast(upper, accumulate_dtype(upper.dtype))
        R = _native(given, rows, cols, size, c, None)
        ctx.native = R is not None
        if R is None:
            Q, S, (*found, R) = _terms(given, rows, cols, size, c)
            ctx.save_for_backward(rows, cols, Q, S, *found)
        else:  # a copy: the library projects the parameter in place
            ctx.save_for_backward(rows, cols, given.clone())
        ctx.size, ctx.c, ctx.dtype = size, c, upper.dtype
        return R

    @staticmethod
    @first_only("neumann")
    def backward(ctx, d):
        rows, cols, *saved = ctx.saved_tensors
        if ctx.native:
            (upper,) = saved
            done = _native(upper, rows, cols, ctx.size, ctx.c, d.contiguous())
            if done is not None:
                return cast(done, ctx.dtype), None, None, None, None
            Q, S, (*found, _) = _terms(upper, rows, cols, ctx.size, ctx.c)
        else:
            Q, S, *found = saved
        c = ctx.c
        dQ, dS = d * c[1], None  # d: of the T at hand
        for T, linear in zip(reversed(found), c[3::2], strict=True):
            step = torch.bmm(d, T.transpose(1, 2))
            dS = step if dS is None else dS.add_(step)
            d = torch.bmm(S, d)
            dQ.add_(d, alpha=linear)
        dS.add_(d, alpha=c[-1])
        # Of Q^T dS + dS Q^T, too, what counts is twice the part that is skew-symmetric.
        dQ.sub_(torch.bmm(Q, dS + dS.transpose(1, 2)))
        at = torch.add(cols, rows, alpha=ctx.size)
        dQ = (dQ - dQ.transpose(1, 2)).flatten(1).index_select(1, at)
        return cast(dQ, ctx.dtype), None, None, None, None


def neumann(upper: Tensor, rows: Tensor, cols: Tensor, size: int, c: Sequence[float]) -> Tensor:
    """R (G, b, b) in fp32 (fp64 for fp64), under autocast too.

    Args:
        upper: (G, b (b - 1) / 2). rows, cols: int64, where its elements are in U. size: b. c: c_0, c_1, ...
    """
    c = (*c, *[0.0] * max(5 - len(c), 1 - len(c) % 2))
    with torch.autocast(upper.device.type, enabled=False) if autocast_dtype(upper) else contextlib.nullcontext():
        return NeumannFunction.apply(upper, rows, cols, size, c)

"""A Kronecker product applied to x and added to y in place, without the N x K matrix.

    Y += s * w1 X w2^T        X (P, Q) is a row of x (M, P Q), Y (I, J) the same row of y (M, I J)

That is s * kron(w1, w2) x, w1 (I, P) and w2 (J, Q), which may be given as a product a b, a (J, R) and b (R, Q). The
cheaper of the two products comes first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...checks import accumulate_dtype, check_number, check_tensor
from ..shapes import autocast_dtype, uncast
from .added import added

# Multiplications of a layer up to which the whole matrix costs less than the calls that do without it.
SMALL = 2**20


class Kron(NamedTuple):
    """w1 (I, P), and w2 (J, Q) or its factors: a (J, R) here and b (R, Q)."""

    w1: Tensor
    w2: Tensor
    b: Tensor | None = None

    @property
    def starts_right(self) -> bool:
        """Whether X w2^T is made before the product with w1."""
        (I, P), (J, Q) = self.w1.shape, self.w2.shape
        return P * J * (Q + I) <= I * Q * (P + J)

    @property
    def width(self) -> int:
        """See ``Map``."""
        (I, P), (J, Q) = self.w1.shape, self.w2.shape
        columns = Q if self.b is None else self.b.shape[1]
        return max(I * J, P * columns, P * J if self.starts_right else I * Q)

    def forward(self, x: Tensor) -> Tensor:
        """See ``Map``."""
        w1, w2, b = self
        X = _matrices(x, w1.shape[1])
        Z = X if b is None else X @ b.t()
        return (_left(w1, Z @ w2.t()) if self.starts_right else _left(w1, Z) @ w2.t()).flatten(1)

    def backward(self, G: Tensor, x: Tensor | None, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """See ``Map``."""
        (w1, w2, b), (need_x, need_w1, need_w2, *need_b) = self, needs
        d1 = d2 = dZ = None
        G, X = _matrices(G, w1.shape[0]), None if x is None else _matrices(x, w1.shape[1])
        Z, inner = X if b is None or x is None else X @ b.t(), need_x or any(need_b)
        if self.starts_right:
            r = _left(w1.t(), G) if inner or need_w2 else None
            d1 = torch.bmm(G, (Z @ w2.t()).mT).sum(0) if need_w1 else None
            d2 = _outer(r, Z) if need_w2 else None
            dZ = r @ w2 if inner else None
        else:
            r = G @ w2 if inner or need_w1 else None
            d1 = torch.bmm(r, Z.mT).sum(0) if need_w1 else None
            d2 = _outer(G, _left(w1, Z)) if need_w2 else None
            dZ = _left(w1.t(), r) if inner else None
        dx = (dZ if b is None else dZ @ b).flatten(1) if need_x else None
        return [dx, d1, d2, *(_outer(dZ, X) if need else None for need in need_b)]


def _matrices(x: Tensor, first: int) -> Tensor:
    return x.reshape(x.shape[0], first, x.shape[1] // first)


def _left(w: Tensor, t: Tensor) -> Tensor:
    # w t for each matrix; torch.matmul would copy them all.
    return torch.bmm(w.expand(t.shape[0], *w.shape), t)


def _outer(a: Tensor, c: Tensor) -> Tensor:
    # Sum over matrices and their rows.
    return a.flatten(0, 1).t() @ c.flatten(0, 1)


def _is_exact(*tensors: Tensor) -> bool:
    # Whether torch's own products are in fp32, or fp64, without a copy of x in another dtype.
    dtype = accumulate_dtype(tensors[0].dtype)
    return all(t.dtype == dtype for t in tensors) and autocast_dtype(tensors[0]) is None


def add_kron(y: Tensor, x: Tensor, w1: Tensor, w2: Tensor | tuple[Tensor, Tensor], scaling: float = 1.0) -> Tensor:
    """y (..., I J) with s * kron(w1, w2) x added, changed in place (see ``added``).

    Args:
        x: (..., P Q). w1: (I, P). w2: (J, Q), or a (J, R) and b (R, Q) whose product it is.

    Raises ValueError, TypeError: naming the factor that does not fit.
    """
    w2, b = w2 if isinstance(w2, tuple) else (w2, None)
    check_number("scaling", scaling)
    for name, w in (("w1", w1), ("w2", w2), ("w2_b", b)):
        if w is not None:
            check_tensor(name, w)
            if w.dim() != 2 or w.device != x.device:
                raise ValueError(f"{name} has shape {tuple(w.shape)} on {w.device}, expected a matrix on {x.device}")
    if b is not None and b.shape[0] != w2.shape[1]:
        raise ValueError(f"w2_a has shape {tuple(w2.shape)} and w2_b {tuple(b.shape)}: they have no product")
    J, Q = w2.shape[0], (w2 if b is None else b).shape[1]
    if (w1.shape[0] * J, w1.shape[1] * Q) != (y.shape[-1], x.shape[-1]):
        raise ValueError(
            f"w1 has shape {tuple(w1.shape)} and w2 ({J}, {Q}): their Kronecker product takes {w1.shape[1] * Q} columns "
            f"to {w1.shape[0] * J}, expected K = {x.shape[-1]} to N = {y.shape[-1]}"
        )
    small = x.numel() * y.shape[-1] <= SMALL and not torch.compiler.is_compiling() and _is_exact(y, x, w1, w2)
    if b is not None and (small or b.shape[0] * (J + Q) >= J * Q):
        with uncast(x):
            w2, b = w2 @ b, None
    if small:
        return y.add_(F.linear(x, torch.kron(w1 * scaling, w2)))
    return added(y, x, scaling, Kron, w1, w2, *(() if b is None else (b,)))

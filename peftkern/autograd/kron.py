"""A Kronecker product applied to x and added to y in place, without the N x K matrix.

    Y += s * w1 X w2^T        X (P, Q) is a row of x (M, P Q), Y (I, J) the same row of y (M, I J)

That is s * kron(w1, w2) x, w1 (I, P) and w2 (J, Q), which may be given as a product a b, a (J, R) and b (R, Q). Rows are
taken by parts whose scratch stays in a CPU's cache, in fp32, the cheaper of the two products first; y is rounded once.
Saved for backward: x, if a factor needs a gradient, and the factors. Backward computes the rest again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import FLOATING, accumulate_dtype, check_number, check_tensor
from .saved import kept_input
from .shapes import autocast_dtype, cast

# Elements of the largest intermediate of a part.
SCRATCH = 2**18
CUDA_SCRATCH = 2**25


class Factors(NamedTuple):
    """w1 (I, P), and w2 (J, Q) or its factors: a (J, R) here and b (R, Q)."""

    w1: Tensor
    w2: Tensor
    b: Tensor | None

    def wide(self, dtype: torch.dtype) -> Factors:
        """The same in this dtype."""
        return Factors(*(None if t is None else cast(t, dtype) for t in self))

    @property
    def starts_right(self) -> bool:
        """Whether X w2^T is made before the product with w1."""
        (I, P), (J, Q) = self.w1.shape, self.w2.shape
        return P * J * (Q + I) <= I * Q * (P + J)

    @property
    def columns(self) -> int:
        """K of x."""
        return self.w1.shape[1] * (self.w2 if self.b is None else self.b).shape[1]

    def parts(self, *given: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Matrices (M, ...) by rows, in parts of one size but for the last."""
        (I, P), (J, Q), first = self.w1.shape, self.w2.shape, given[0]
        if torch.compiler.is_compiling():
            rows = first.shape[0]
        else:
            width = max(I * J, self.columns, P * J if self.starts_right else I * Q)
            rows = (SCRATCH if first.is_cpu else CUDA_SCRATCH) // max(width, 1)
        return zip(*(t.split(max(rows, 1)) for t in given))

    def forward(self, x: Tensor) -> Tensor:
        """(n, I, J) of x (n, K)."""
        w1, w2, b = self
        X = _matrices(x, w1.shape[1])
        Z = X if b is None else X @ b.t()
        return _left(w1, Z @ w2.t()) if self.starts_right else _left(w1, Z) @ w2.t()

    def backward(self, G: Tensor, x: Tensor | None, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """Gradients of x (n, K), w1, w2 and b, None where not needed, of G (n, N). x: None if only its own is needed."""
        (w1, w2, b), (need_x, need_w1, need_w2, need_b) = self, needs
        dx = d1 = d2 = db = dZ = None
        G, X = _matrices(G, w1.shape[0]), None if x is None else _matrices(x, w1.shape[1])
        Z = X if b is None or X is None else X @ b.t()
        if self.starts_right:
            r = _left(w1.t(), G) if need_x or need_b or need_w2 else None
            d1 = torch.bmm(G, (Z @ w2.t()).mT).sum(0) if need_w1 else None
            d2 = _outer(r, Z) if need_w2 else None
            dZ = r @ w2 if need_x or need_b else None
        else:
            r = G @ w2 if need_x or need_b or need_w1 else None
            d1 = torch.bmm(r, Z.mT).sum(0) if need_w1 else None
            d2 = _outer(G, _left(w1, Z)) if need_w2 else None
            dZ = _left(w1.t(), r) if need_x or need_b else None
        if need_b:
            db = _outer(dZ, X)
        if need_x:
            dx = (dZ if b is None else dZ @ b).flatten(1)
        return [dx, d1, d2, db]


def _matrices(x: Tensor, first: int) -> Tensor:
    return x.reshape(x.shape[0], first, x.shape[1] // first)


def _left(w: Tensor, t: Tensor) -> Tensor:
    # w t for each matrix; torch.matmul would copy them all.
    return torch.bmm(w.expand(t.shape[0], *w.shape), t)


def _outer(a: Tensor, c: Tensor) -> Tensor:
    # Sum over matrices and their rows.
    return a.flatten(0, 1).t() @ c.flatten(0, 1)


class KronFunction(torch.autograd.Function):
    """``add_kron`` with its gradients."""

    @staticmethod
    def forward(ctx, y, x, w1, w2, b, scaling):
        compiling = torch.compiler.is_compiling()
        acc = accumulate_dtype(y.dtype)
        factors = Factors(w1, w2, b).wide(acc)
        dtype = autocast_dtype(x)
        given = x if dtype is None else cast(x, dtype)
        kept = given if compiling or not any(ctx.needs_input_grad[2:5]) else kept_input(x, given, None)
        ctx.save_for_backward(kept if any(ctx.needs_input_grad[2:5]) else None, w1, w2, b)
        ctx.scaling, ctx.x = scaling, (x.shape, x.dtype)
        if compiling:
            y = y.clone()
        else:
            ctx.mark_dirty(y)
        for rows, part in factors.parts(given.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])) if y.numel() else ():
            part.add_(factors.forward(cast(rows, acc)).flatten(1), alpha=scaling)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, *factors = ctx.saved_tensors
        shape, x_dtype = ctx.x
        needs, acc = ctx.needs_input_grad[1:5], accumulate_dtype(dy.dtype)
        wide, sums, dxs = Factors(*factors).wide(acc), [0.0] * 3, []
        dys = dy.reshape(-1, dy.shape[-1])
        parts = wide.parts(dys) if x is None else wide.parts(dys, x.reshape(-1, shape[-1]))
        for G, *rows in parts if dy.numel() else ():
            G = cast(G, acc) * ctx.scaling
            dx, *found = wide.backward(G, cast(rows[0], acc) if rows else None, needs)
            dxs.append(None if dx is None else cast(dx, x_dtype))
            sums = [None if d is None else s + d for s, d in zip(sums, found)]
        dx = None
        if needs[0]:
            dx = (
                (dxs[0] if len(dxs) == 1 else torch.cat(dxs)).view(shape) if dxs else dy.new_zeros(shape, dtype=x_dtype)
            )
        grads = [
            None if not need else torch.zeros_like(t) if type(d) is float else cast(d, t.dtype)
            for need, d, t in zip(needs[1:], sums, factors)
        ]
        return (dy if ctx.needs_input_grad[0] else None, dx, *grads, None)


def add_kron(
    y: Tensor, x: Tensor, w1: Tensor, w2: Tensor | tuple[Tensor, Tensor], scaling: float = 1.0
) -> Tensor:  # fmt: skip
    """y (..., I J) with s * kron(w1, w2) x added, changed in place.

    Args:
        y: in x's dtype or wider. x: (..., P Q). w1: (I, P). w2: (J, Q), or a (J, R) and b (R, Q) whose product it is.
            All of fp32, bf16, fp16 or fp64.

    Raises ValueError, TypeError: naming the factor that does not fit.
    """
    w2, b = w2 if isinstance(w2, tuple) else (w2, None)
    check_number("scaling", scaling)
    for name, w in (("w1", w1), ("w2", w2), ("w2_b", b)):
        if w is not None:
            check_tensor(name, w, dtypes=FLOATING)
            if w.dim() != 2:
                raise ValueError(f"{name} has shape {tuple(w.shape)}, expected a matrix")
    if b is not None and b.shape[0] != w2.shape[1]:
        raise ValueError(f"w2_a {tuple(w2.shape)} and w2_b {tuple(b.shape)} have no product")
    J, Q = w2.shape[0], (w2 if b is None else b).shape[1]
    if (w1.shape[0] * J, w1.shape[1] * Q) != (y.shape[-1], x.shape[-1]):
        raise ValueError(
            f"w1 has shape {tuple(w1.shape)} and w2 {(J, Q)}: their Kronecker product does not take K = {x.shape[-1]} "
            f"to N = {y.shape[-1]}"
        )
    if b is not None and b.shape[0] * (J + Q) >= J * Q:
        w2, b = w2 @ b, None
    if torch._C._get_tracing_state() is not None:
        acc = accumulate_dtype(y.dtype)
        delta = Factors(w1, w2, b).wide(acc).forward(x.reshape(-1, x.shape[-1]).to(acc))
        return (y + scaling * delta.view(y.shape)).to(y.dtype)
    return KronFunction.apply(y, x, w1, w2, b, scaling)

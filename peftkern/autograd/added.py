"""A linear map that few numbers make, applied to x and added to y in place, as autograd sees it.

    y += s * map(x)

Rows are taken by parts whose scratch stays in a CPU's cache, in fp32 (fp64 for fp64); y is rounded once.
Saved for backward: x, if a factor needs a gradient, and the factors. Backward computes the rest again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..checks import accumulate_dtype
from .saved import kept_input
from .shapes import autocast_dtype, cast, exactly

# Elements of the largest intermediate of a part.
SCRATCH = 2**18
CUDA_SCRATCH = 2**25


class Map(Protocol):
    """A map of rows, with its factors in the dtype that it is computed in.

    ``width``: elements of its largest intermediate for a row.
    """

    width: int

    def forward(self, x: Tensor) -> Tensor:
        """(n, N) of x (n, K)."""

    def backward(self, G: Tensor, x: Tensor | None, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """Gradients of x (n, K) and of each factor, None where ``needs`` has none, of G (n, N). x: None if only its own
        is needed."""


def _parts(width: int, *given: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = given[0].shape[0]
    if not torch.compiler.is_compiling():
        rows = (SCRATCH if given[0].is_cpu else CUDA_SCRATCH) // max(width, 1)
    return zip(*(t.split(max(rows, 1)) for t in given))


class AddedFunction(torch.autograd.Function):
    """The sum with its gradients. ``make``: the map of its factors."""

    @staticmethod
    def forward(ctx, y, x, scaling, make, *factors):
        compiling, learns = torch.compiler.is_compiling(), any(ctx.needs_input_grad[4:])
        dtype, acc = autocast_dtype(x), accumulate_dtype(y.dtype)
        given = x if dtype is None else cast(x, dtype)
        kept = (given if compiling else kept_input(x, given, None)) if learns else None
        ctx.save_for_backward(kept, *factors)
        ctx.given = scaling, make, x.shape, x.dtype
        if compiling:
            y = y.clone()
        else:
            ctx.mark_dirty(y)
        if y.numel():
            with exactly(x):
                form = _make(make, factors, acc)
                for rows, part in _parts(form.width, given.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])):
                    part.add_(form.forward(cast(rows, acc)), alpha=scaling)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x, *factors), (scaling, make, shape, x_dtype) = ctx.saved_tensors, ctx.given
        needs = ctx.needs_input_grad[1], *ctx.needs_input_grad[4:]
        acc, dx = accumulate_dtype(dy.dtype), dy.new_zeros(shape, dtype=x_dtype) if needs[0] else None
        sums = [torch.zeros_like(t, dtype=acc) if need else None for t, need in zip(factors, needs[1:])]
        if dy.numel():
            given = [t.reshape(-1, t.shape[-1]) for t in (dy, dx, x) if t is not None]
            with exactly(dy):
                form = _make(make, factors, acc)
                for G, *rows in _parts(form.width, *given):
                    into = rows.pop(0) if needs[0] else None
                    found = form.backward(cast(G, acc) * scaling, cast(rows[0], acc) if rows else None, needs)
                    for total, part in zip((into, *sums), found, strict=True):
                        if total is not None:
                            total.add_(part)
        grads = [None if total is None else cast(total, t.dtype) for total, t in zip(sums, factors)]
        return (dy if ctx.needs_input_grad[0] else None, dx, None, None, *grads)


def _make(make: Callable[..., Map], factors, dtype: torch.dtype) -> Map:
    return make(*(cast(t, dtype) for t in factors))


def added(y: Tensor, x: Tensor, scaling: float, make: Callable[..., Map], *factors: Tensor) -> Tensor:
    """y (..., N) with s * map(x) added, changed in place unless a trace or a graph is made.

    Args:
        y: contiguous, in the dtype that the layer puts out, or wider. x: (..., K). make: a map of its factors.
            factors: of any dtype, with gradients of theirs.
    """
    if torch._C._get_tracing_state() is not None:
        acc = accumulate_dtype(y.dtype)
        delta = _make(make, factors, acc).forward(cast(x.reshape(-1, x.shape[-1]), acc))
        return (y + scaling * delta.view(y.shape)).to(y.dtype)
    return AddedFunction.apply(y, x, scaling, make, *factors)

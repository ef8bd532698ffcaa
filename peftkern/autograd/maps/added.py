"""A linear map that few numbers make, applied to x and added to y in place, as autograd sees it.

    y += s * map(x)

Rows are taken by parts whose scratch stays in a CPU's cache, in fp32 (fp64 for fp64); y is rounded once.
Saved for backward: x, if a factor needs a gradient, and the factors. Backward computes the rest again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from ...checks import accumulate_dtype
from ..saved import first_only, kept_input
from ..shapes import autocast_dtype, cast, rows_of, uncast

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


def _parts(width: int, *given: Tensor) -> Iterable[tuple[Tensor, ...]]:
    rows = max((SCRATCH if given[0].is_cpu else CUDA_SCRATCH) // max(width, 1), 1)
    if rows >= given[0].shape[0] or torch.compiler.is_compiling():
        return (given,)
    return zip(*(t.split(rows) for t in given))


def _add(y: Tensor, given: Tensor, form: Map, scaling: float) -> None:
    acc = accumulate_dtype(y.dtype)
    if y.numel():
        for rows, part in _parts(form.width, rows_of(given, given.dtype), y.view(-1, y.shape[-1])):
            part.add_(form.forward(cast(rows, acc)), alpha=scaling)


class AddedFunction(torch.autograd.Function):
    """The sum with its gradients. ``make``: the map of its factors."""

    @staticmethod
    def forward(ctx, y, x, scaling, make, *factors):
        compiling, learns = torch.compiler.is_compiling(), any(ctx.needs_input_grad[4:])
        dtype = autocast_dtype(x)
        given = x if dtype is None else cast(x, dtype)
        kept = (given if compiling else kept_input(x, given, None)) if learns else None
        ctx.save_for_backward(kept, *factors)
        ctx.given = scaling, make, x.shape, x.dtype
        if compiling:
            y = y.clone()
        else:
            ctx.mark_dirty(y)
        with uncast(x):
            _add(y, given, _make(make, factors, y.dtype), scaling)
        return y

    @staticmethod
    @first_only("a layer with factors")
    def backward(ctx, dy):
        (x, *factors), (scaling, make, shape, x_dtype) = ctx.saved_tensors, ctx.given
        needs = ctx.needs_input_grad[1], *ctx.needs_input_grad[4:]
        acc, new = accumulate_dtype(dy.dtype), dy.new_empty if dy.numel() else dy.new_zeros
        dx = new(shape, dtype=x_dtype) if needs[0] else None
        sums: list[Tensor | None] = [None] * len(factors)
        if dy.numel():
            given = [rows_of(t, t.dtype) for t in (dy, dx, x) if t is not None]
            with uncast(dy):
                form = _make(make, factors, acc)
                for G, *rows in _parts(form.width, *given):
                    into = rows.pop(0) if needs[0] else None
                    part, *found = form.backward(cast(G, acc) * scaling, cast(rows[0], acc) if rows else None, needs)
                    if into is not None:
                        into.copy_(part)
                    sums = [
                        part if total is None else total.add_(part) for total, part in zip(sums, found, strict=True)
                    ]
        grads = [
            (torch.zeros_like(t) if total is None else cast(total, t.dtype)) if need else None
            for total, t, need in zip(sums, factors, needs[1:])
        ]
        return (dy if ctx.needs_input_grad[0] else None, dx, None, None, *grads)


def _make(make: Callable[..., Map], factors: Iterable[Tensor], dtype: torch.dtype) -> Map:
    acc = accumulate_dtype(dtype)
    return make(*(cast(t, acc) for t in factors))


def added(y: Tensor, x: Tensor, scaling: float, make: Callable[..., Map], *factors: Tensor) -> Tensor:
    """y (..., N) with s * map(x) added, changed in place unless a trace or a graph is made.

    Args:
        y: contiguous, in the dtype that the layer puts out, or wider. x: (..., K). make: a map of its factors.
            factors: of any dtype, with gradients of theirs.
    """
    if torch._C._get_tracing_state() is not None:
        delta = _make(make, factors, y.dtype).forward(rows_of(x, accumulate_dtype(y.dtype)))
        return (y + scaling * delta.view(y.shape)).to(y.dtype)
    # A compiler gets a function that needs no gradient wrong where its forward takes any number of arguments
    # (findings/torch_compile_autograd_function_varargs.sh).
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *factors))):
        given = cast(x, autocast_dtype(x) or x.dtype)
        y = y.clone() if torch.compiler.is_compiling() else y
        with uncast(x):
            _add(y, given, _make(make, factors, y.dtype), scaling)
        return y
    return AddedFunction.apply(y, x, scaling, make, *factors)

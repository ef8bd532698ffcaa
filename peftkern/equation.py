"""The one equation, as data: where a coefficient acts, on which axis, and what its gradient needs.

    y = g_b * Base(x * p_b) + s * g_d * ((d * (drop(x) * p_d) A^T) B^T) + bias

A row of ``COEFFICIENTS`` is a vector that a caller may pass. It acts at one ``Place``; a kernel reads one vector a place
(``Scales``), and coefficients that share a place are multiplied before (``fold``), in torch, whose autograd sees to their
gradients. So a new coefficient at a known place is one row here, and nothing below changes. Argument checks, what
backward needs and saves, and the tables of the documents are made of these rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from .checks import FLOATING, accumulate_dtype, check_fits


class Place(NamedTuple):
    """Where a vector acts. ``axis``: its length, K in_features, R rank or N out_features.

    ``saves``: what backward reads besides dy for the gradient, x the input, u = (drop(x) * p_d) A^T or h = Base(x * p_b).
    ``gradient``: of the vector, with dv = s (g_d * dy) B, du = d * dv and H = dy^T (d * u).
    """

    symbol: str
    axis: str
    meaning: str
    saves: str
    gradient: str


class Coefficient(NamedTuple):
    """A keyword of the public functions, and the symbol of the place where it acts."""

    name: str
    symbol: str


PLACES = (
    Place("d", "R", "scale of the rank", "u", "sum_t dv * u"),
    Place("p_b", "K", "scale of the base's input", "x", "sum_t Base'(g_b * dy) * x"),
    Place("p_d", "K", "scale of the branch's input", "x", "coldot(A, du^T drop(x))"),
    Place("g_b", "N", "scale of the base's output", "h", "sum_t dy * h"),
    Place("g_d", "N", "scale of the branch's output", "u", "s rowdot(B, H)"),
)
COEFFICIENTS: tuple[Coefficient, ...] = (
    Coefficient("rank_scale", "d"),
    Coefficient("base_in_scale", "p_b"),
    Coefficient("delta_in_scale", "p_d"),
    Coefficient("base_out_scale", "g_b"),
    Coefficient("delta_out_scale", "g_d"),
)


class Scales(NamedTuple):
    """The vector at each place, None where it is 1. In fp32 or the activation's dtype."""

    d: Tensor | None = None
    p_b: Tensor | None = None
    p_d: Tensor | None = None
    g_b: Tensor | None = None
    g_d: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients a backward pass is to compute."""

    x: bool
    A: bool
    B: bool
    bias: bool
    d: bool = False
    p_b: bool = False
    p_d: bool = False
    g_b: bool = False
    g_d: bool = False


NO_SCALES = Scales()


def place(symbol: str) -> Place:
    """The place with this symbol."""
    return next(p for p in PLACES if p.symbol == symbol)


def names(symbol: str) -> str:
    """The arguments that act at a place, for messages: ``rank_scale``, or several with ``times`` between."""
    return " times ".join(c.name for c in COEFFICIENTS if c.symbol == symbol) or symbol


def fold(values: Mapping[str, Tensor | None], like: Tensor) -> Scales:
    """Coefficients by name as one vector a place; those that share one are multiplied in fp32 (fp64 for fp64 ``like``).

    Raises TypeError for a name that no row has, ValueError for vectors that share a place and do not fit each other.
    """
    rows = {c.name: c.symbol for c in COEFFICIENTS}
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if name not in rows:
            raise TypeError(f"{name} is no coefficient; there are {', '.join(rows)}")
        if value is None:
            continue
        other = found.get(rows[name])
        if other is not None:
            # A product would broadcast.
            check_fits(name, value, other.shape, f"({place(rows[name]).axis},)", other.device, FLOATING)
            dtype = accumulate_dtype(like.dtype)
            value = other.to(dtype) * value.to(dtype)
        found[rows[name]] = value
    return Scales(**found)


def table() -> list[tuple[str, str, str, str, str]]:
    """(argument, symbol, shape, saved for its gradient, gradient) of every coefficient, for the documents."""
    rows = []
    for c in COEFFICIENTS:
        p = place(c.symbol)
        rows.append((c.name, p.symbol, f"({p.axis})", p.saves, p.gradient))
    return rows

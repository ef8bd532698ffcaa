"""A linear layer with what its adapters make of it: linear branches (family L), whose coefficients are the methods', and more.

    y = g_b * ((x * p_b) W^T) + sum over branches of s * g_d * ((d * ((drop(x) * p_d) A^T)) B^T) + bias + terms

of an x that may be rotated in blocks of columns before all else (family S). A term is whatever else a method makes of x.

A method's ``apply`` takes such a layer and gives another: what stands there already may be scaled, a branch, a term or a
rotation added, the bias or the weight itself changed. ``run`` computes what has come out. The symbols are those of
peftkern/equation.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autograd.block_rotate import block_rotate
from ..autograd.dropout_mask import zeroed
from ..autograd.lora_linear import Options, lora_linear_with
from ..autograd.pair_rotate import pair_rotate
from ..autograd.shapes import autocast_dtype
from ..autograd.weight.dropped_base import dropped_base
from ..autograd.weight.folded_linear import folded_linear
from ..bases.base import Base, base_of
from ..checks import accumulate_dtype, check_beside, check_parts
from ..equation import COEFFICIENTS, Scales
from ..many.adapter import Adapter
from ..ops.dropout_mask import seed_tensor

# Ranks from which a branch is products of whole matrices: what the op with the base makes of it pays while A and B are thin.
# No table of a CPU says it: what is saved for backward depends on it, and must not differ from one machine to the next.
WHOLE = 512


class Branch(NamedTuple):
    """lora_A (R, K), lora_B (N, R), and the branch's scales. ``seed``: of its dropout, as in ``lora_linear``.

    ``share`` (N): this much of the base product of the branch's input too, share * (drop(x) W^T).
    ``route``: the branch's input (..., K) -> a scale of its own for every row and group of ranks, all of one size (..., groups).
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float | Tensor = 1.0
    dropout_p: float = 0.0
    d: Tensor | None = None
    p_d: Tensor | None = None
    g_d: Tensor | None = None
    share: Tensor | None = None
    seed: int | Tensor | None = None
    route: Callable[[Tensor], Tensor] | None = None

    def scaled(self, g: Tensor) -> Branch:
        """All of it times g (N)."""
        return self._replace(g_d=times(self.g_d, g), share=None if self.share is None else self.share * g)

    @property
    def whole(self) -> bool:
        """Whether its factors are whole matrices, as large as the weight may be."""
        return self.lora_A.shape[0] >= WHOLE

    @property
    def apart(self) -> bool:
        """Whether the op with the base cannot have it, or is slower."""
        return self.share is not None or self.route is not None or self.whole


class Term(Protocol):
    """A term of another form than a branch."""

    def onto(self, y: Tensor, x: Tensor) -> Tensor:
        """y (..., N), which may be changed in place, with the term of x (..., K) added."""


class Scaled(NamedTuple):
    """A term times g (N)."""

    term: Term
    g: Tensor

    def onto(self, y: Tensor, x: Tensor) -> Tensor:
        wide = torch.zeros_like(y, dtype=accumulate_dtype(y.dtype))
        return y.add_(self.term.onto(wide, x) * self.g)


class Rotation(NamedTuple):
    """Matrices R (G, b, b) of the blocks of columns, or (1, b, b) of all, and the columns' ``index``, as in ``block_rotate``."""

    R: Tensor
    index: Tensor | None = None


class Turn(NamedTuple):
    """Angles, scales and size of the groups of columns in which pairs are rotated, as in ``pair_rotate``."""

    theta: Tensor
    alpha: Tensor
    group: int


class Linear(NamedTuple):
    """A layer so far. ``p_b``, ``g_b``: scales of the base. ``added``: what adapters add to the bias. ``folded`` (N, K): what
    they have made of the weight, in fp32 or its own dtype, None where it is what it was. ``rotations``: of x,
    and ``turns`` of y, bias and all, the first first.

    Vectors are in fp32 or the activation's dtype; bias and ``added`` are added last and not scaled.
    """

    weight: Tensor | Base  # (N, K)
    bias: Tensor | None = None
    branches: tuple[Branch, ...] = ()
    p_b: Tensor | None = None
    g_b: Tensor | None = None
    added: Tensor | None = None
    folded: Tensor | None = None
    terms: tuple[Term, ...] = ()
    rotations: tuple[Rotation, ...] = ()
    made: tuple[Callable[[Tensor], Branch], ...] = ()
    turns: tuple[Turn, ...] = ()

    def add(self, branch: Branch) -> Linear:
        """With one more branch."""
        weight, bias, branches, *rest = self
        return Linear(weight, bias, (*branches, branch), *rest)

    def add_made(self, make: Callable[[Tensor], Branch]) -> Linear:
        """With a branch that is made of x (..., K) at each call."""
        return self._replace(made=(*self.made, make))

    def add_term(self, term: Term) -> Linear:
        """With one more term."""
        return self._replace(terms=(*self.terms, term))

    def fold(self, change: Tensor) -> Linear:
        """With a matrix (N, K) added to the weight: in fp32 it stays in fp32, and so does all that is made of it."""
        return self._replace(folded=self.whole_weight() + change)

    def whole_weight(self) -> Tensor:
        """The weight as adapters have changed it."""
        return self.weight if self.folded is None else self.folded

    def add_bias(self, term: Tensor) -> Linear:
        """With a vector (N) added to the bias."""
        return self._replace(added=term if self.added is None else self.added + term)

    def whole_bias(self) -> Tensor | None:
        """The base's bias and what was added to it."""
        bias, added = self.bias, self.added
        return bias if added is None else added if bias is None else bias.to(accumulate_dtype(bias.dtype)) + added

    def scaled(self, g: Tensor) -> Linear:
        """All but the base's own bias times g (N)."""
        branches = tuple(b.scaled(g) for b in self.branches)
        added = None if self.added is None else self.added * g
        terms = tuple(Scaled(term, g) for term in self.terms)
        made = tuple(lambda x, make=make: make(x).scaled(g) for make in self.made)
        return self._replace(branches=branches, g_b=times(self.g_b, g), added=added, terms=terms, made=made)


def frozen_weight(weight: Tensor | Base, bias: Tensor | None, **parts: tuple) -> Tensor | Base:
    """The weight of a functional form, what is in codes as a base; bias and parts are checked as in ``check_parts``.

    Raises ValueError, TypeError: as ``check_parts``, and for a base that does not know its shape.
    """
    base = base_of(weight)
    if base.kind == "dense":
        (weight,) = base.tensors
        check_parts(weight, bias, **parts)
        return weight
    if base.shape is None:
        raise ValueError(f"weight is a base of kind {base.kind} without a shape, which is needed here")
    check_beside(base, bias, parts)
    return base


def times(scale: Tensor | None, factor: Tensor) -> Tensor:
    """A scale, None for 1, times a factor."""
    return factor if scale is None else scale * factor


def wide_scaling(scaling: float | Tensor, like: Tensor) -> float | Tensor:
    """A scaling as vectors in fp32 (fp64 for fp64 ``like``) are multiplied by it."""
    return scaling.to(accumulate_dtype(like.dtype)) if isinstance(scaling, Tensor) else scaling


def run(y: Linear, x: Tensor) -> Tensor:
    """y of x (..., K): one fused call, but for terms, a folded weight, further branches that drop and a branch with a share of
    the base."""
    if y.rotations:
        x = _rotated(x, y.weight.shape[1], y.rotations)
    if y.made:
        y = y._replace(branches=(*y.branches, *(make(x) for make in y.made)), made=())
    result = _run_branches(y, x) if y.folded is None else _run_folded(y, x)
    for term in y.terms:
        result = term.onto(result, x)
    return _turned(result, y.turns) if y.turns else result


def _run_branches(y: Linear, x: Tensor) -> Tensor:
    weight, _, branches, p_b, g_b, *_ = y
    bias = y.whole_bias()
    if not branches:
        N, K = weight.shape
        none = x.new_empty((0, K)), x.new_empty((N, 0))
        scales = None if p_b is None and g_b is None else Scales(None, p_b, None, g_b, None)
        return lora_linear_with(x, weight, *none, bias, coefficients=scales)
    others: tuple[Branch, ...] = ()
    shares: tuple[Branch, ...] = ()
    if len(branches) > 1 or branches[0].apart:
        branches, shares = _without_shares(branches, x, weight)
        fused, others = _fused(branches)
    else:
        (fused,) = branches
    A, B, scaling, p, d, p_d, g_d, _, seed, _ = fused
    plain = d is None and p_d is None and g_d is None and p_b is None and g_b is None
    scales = None if plain else Scales(d, p_b, p_d, g_b, g_d)
    result = lora_linear_with(x, weight, A, B, bias, Options(scaling, p, seed), scales)
    if not others and not shares:
        return result
    total = result
    for branch in others:
        total = total + _alone(weight, branch, x)
    for b in shares:
        total = total + dropped_base(x, weight, b.share, b.dropout_p, b.seed)
    return total.to(result.dtype)  # some terms are wider


def _run_folded(y: Linear, x: Tensor) -> Tensor:
    # In the dtype of the folded weight, rounded once to that of the layer.
    dtype, bias = autocast_dtype(x) or x.dtype, y.whole_bias()
    if y.weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight requires grad, but gets no gradient here: freeze it with requires_grad_(False)")
    into = x if y.p_b is None else x * y.p_b
    total = folded_linear(into, y.folded, bias if y.g_b is None else None)
    if y.g_b is not None:
        total = total * y.g_b if bias is None else total * y.g_b + bias
    for branch in y.branches:
        total = total + _alone(y.weight, branch, x)
    return total.to(dtype)


def _rotated(x: Tensor, K: int, rotations: tuple[Rotation, ...]) -> Tensor:
    # Rounded once, after the last.
    if x.shape[-1:] != (K,):
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., K) with K = {K}")
    given = x.dtype
    if len(rotations) > 1:
        x = x.to(accumulate_dtype(given))
    for R, index in rotations:
        x = block_rotate(x, R, index)
    return x.to(given)


def _turned(y: Tensor, turns: tuple[Turn, ...]) -> Tensor:
    # Rounded once, after the last.
    given = y.dtype
    if len(turns) > 1:
        y = y.to(accumulate_dtype(given))
    for turn in turns:
        y = pair_rotate(y, *turn)
    return y.to(given)


_NAMES = {c.symbol: c.name for c in COEFFICIENTS}


def entry(y: Linear, bias: Tensor | None) -> Adapter:
    """A layer with one adapter as an entry of a list of adapters over a base with this bias.

    Raises ValueError for what is more than the coefficients of one branch.
    """
    if y.folded is not None or any((y.terms, y.rotations, y.made, y.turns, y.branches[1:])):
        raise ValueError("the layer is more than a weight with coefficients and one branch")
    vectors: dict[str, Tensor | None] = {"p_b": y.p_b, "g_b": y.g_b}
    A = B = None
    s: float | Tensor = 1.0
    if y.branches:
        ((A, B, s, _, d, p_d, g_d, *_),) = y.branches
        vectors |= {"d": d, "p_d": p_d, "g_d": g_d}
        if isinstance(s, Tensor):
            # The op wants a number, and one from the device would make the host wait.
            vectors["d"], s = whole_d(y.branches[0]), 1.0
    whole = y.whole_bias()
    own = None if whole is bias else whole
    return Adapter(A, B, s, bias=own, **{_NAMES[symbol]: v for symbol, v in vectors.items() if v is not None})


def _without_shares(
    branches: tuple[Branch, ...], x: Tensor, weight: Tensor | Base
) -> tuple[tuple[Branch, ...], tuple[Branch, ...]]:
    # A branch drops what its share drops: in the op with the base, and of an input of its own, by one seed. A trace has
    # torch's dropout, which has none: there they stay together, and on a base that the op alone can read.
    if _tracing() or isinstance(weight, Base):
        return branches, ()
    seeded = [b if b.share is None else b._replace(seed=seed_tensor(b.seed, x.device)) for b in branches]
    return tuple(b._replace(share=None) for b in seeded), tuple(b for b in seeded if b.share is not None)


def _fused(branches: tuple[Branch, ...]) -> tuple[Branch, tuple[Branch, ...]]:
    # Masks are independent, so one branch that drops can share the op with the base: one that does, since that costs the
    # composition the most memory. Branches without dropout add up to one. Some are apart.
    apart = tuple(b for b in branches if b.apart)
    rest = tuple(b for b in branches if not b.apart)
    dropping = [b for b in rest if b.dropout_p > 0.0]
    if not rest:
        nothing = apart[0]
        # Detached: x is kept for an A that requires grad, though it has no rows.
        return Branch(nothing.lora_A[:0].detach(), nothing.lora_B[:, :0].detach()), apart
    if not dropping:
        return (rest[0] if len(rest) == 1 else _stacked(rest)), apart
    return dropping[0], (*apart, *(b for b in rest if b is not dropping[0]))


def _stacked(branches: tuple[Branch, ...]) -> Branch:
    # Ranks one below the other. Scalings become a scale of the ranks, unless all are the same; scales of the input and of
    # the output differ from branch to branch, so they go into the matrices.
    A = torch.cat([b.lora_A if b.p_d is None else (b.lora_A * b.p_d).to(b.lora_A.dtype) for b in branches])
    B = torch.cat([b.lora_B if b.g_d is None else (b.lora_B * b.g_d[:, None]).to(b.lora_B.dtype) for b in branches], 1)
    first = branches[0].scaling
    if all(b.d is None and not isinstance(b.scaling, Tensor) and b.scaling == first for b in branches):
        return Branch(A, B, first)
    return Branch(A, B, d=torch.cat([whole_d(b) for b in branches]))


def whole_d(b: Branch) -> Tensor:
    """d times the scaling, (R) in fp32 or better: what a branch with scaling 1 has for d."""
    d = b.lora_A.new_ones(1) if b.d is None else b.d
    return (d.to(accumulate_dtype(d.dtype)) * wide_scaling(b.scaling, d)).expand(b.lora_A.shape[0])


def _alone(weight: Tensor, b: Branch, x: Tensor) -> Tensor:
    # A branch by itself. With a share of the base, both read the same dropped input.
    dropped, factor = drop(x, b.dropout_p, b.seed)
    scaling = b.scaling * factor
    if b.share is not None:
        scales = Scales(b.d, None, b.p_d, b.share * factor, b.g_d)
        return lora_linear_with(dropped, weight, b.lora_A, b.lora_B, None, Options(scaling), scales)
    down, product = dropped if b.p_d is None else dropped * b.p_d, folded_linear
    if not b.whole:
        down, product = down.to(b.lora_A.dtype), F.linear
    u = product(down, b.lora_A)
    if b.route is not None:
        by = b.route(down.to(b.lora_A.dtype))
        u = (u.unflatten(-1, (by.shape[-1], -1)) * by[..., None]).flatten(-2)
    delta = product(u if b.d is None else (u * b.d).to(b.lora_B.dtype), b.lora_B)
    delta = delta if b.g_d is None else delta * b.g_d
    return delta if type(scaling) is float and scaling == 1.0 else delta * scaling


def drop(x: Tensor, p: float, seed: int | Tensor | None) -> tuple[Tensor, float]:
    """x without the elements that are dropped, and the factor of what is left, which rounds less where a scale takes it.

    The bits are those of ``dropout_mask``, and backward keeps their seed alone; torch's own where a trace is made.
    """
    if p == 0.0:
        return x, 1.0
    if _tracing():
        return F.dropout(x, p), 1.0
    return zeroed(x, p, seed_tensor(seed, x.device)), 1.0 / (1.0 - p)


def _tracing() -> bool:
    return torch._C._get_tracing_state() is not None

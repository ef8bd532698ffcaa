"""Error against an fp64 oracle, judged by the error that eager PyTorch makes.

A problem (peftkern/testing/problems.py) brings two independent statements of its equation, in plain torch with
autograd: the oracle, which runs in fp64, and eager, which is HF PEFT's order of operations in the dtypes of the call.

An output passes if its error is at most ``FACTOR`` times eager's, both as root mean square and as maximum, or below a
floor: 4 ulp in fp32, half an ulp in half precision, plus half an fp32 ulp of the same result computed with absolute
values (what cancellation makes unavoidable).

The errors of an output with a handful of elements are a handful of random numbers, eager's as much as ours: their ratio
says little. Where such an output is over its bound, the same problem is drawn again with other values until ``FEW``
elements are there (at most ``DRAWS`` draws), and all of them together, the first included, are held to the same bound.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

FACTOR = 1.5
FEW, DRAWS = 256, 64

_SIGNIFICANT_BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
_SMALLEST_ULP = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


class Problem(Protocol):
    """What is judged: a frozen record with a ``seed``, that makes its tensors and runs them three ways.

    Each way takes the dictionary of ``tensors()`` (without ``dy``) and returns the output. ``absolute``: with absolute
    values of numbers that are no tensors.
    """

    seed: int
    frozen: frozenset[str]

    def tensors(self) -> dict[str, Tensor]: ...
    def ours(self, t: dict[str, Tensor]) -> Tensor: ...
    def eager(self, t: dict[str, Tensor]) -> Tensor: ...
    def oracle(self, t: dict[str, Tensor], absolute: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class Row:
    """One output or gradient. Errors are (rms, max); ``ratio`` is the larger error over its bound: at most 1 passes."""

    output: str
    elements: int
    error: tuple[float, float]
    eager: tuple[float, float]
    floor: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Largest of error / bound, infinite for a NaN."""
        worst = 0.0
        for error, eager, floor in zip(self.error, self.eager, self.floor, strict=True):
            bound = max(FACTOR * eager, floor)
            ratio = error / bound if bound > 0 else (0.0 if error == 0 else math.inf)
            worst = max(worst, ratio if not math.isnan(ratio) else math.inf)
        return worst

    @property
    def ok(self) -> bool:
        """Whether every error is within its bound."""
        return self.ratio <= 1.0


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of ``dtype`` at |values| (fp64 in, fp64 out)."""
    _, exponent = torch.frexp(values.double())
    size = torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent - _SIGNIFICANT_BITS[dtype])
    return size.clamp_min(_SMALLEST_ULP[dtype])


def _run(
    function: Callable[[dict[str, Tensor]], Tensor], t: dict[str, Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    leaves = {k: v.detach().requires_grad_(k in names) for k, v in t.items() if k != "dy"}
    y = function(leaves)
    grads = torch.autograd.grad(y, [leaves[n] for n in names], t["dy"].to(y.dtype)) if names else ()
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(names, grads, strict=True)}}


def moved(t: Tensor, device: str) -> Tensor:
    """``t`` on another device with the strides it has; what lies between its elements is NaN."""
    return t if t.device.type == device else spread(t, device)


def spread(t: Tensor, device: str) -> Tensor:
    """A copy of ``t`` as ``moved`` makes it."""
    if t.numel() == 0:
        return t.to(device)
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return torch.full((span,), math.nan, dtype=t.dtype, device=device).as_strided(t.shape, t.stride()).copy_(t)


def run_ours(problem: Problem, t: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The output and the gradients of ``names`` from peftkern."""
    return _run(problem.ours, t, names)


@functools.lru_cache(maxsize=1)
def _expected(problem: Problem, names: tuple[str, ...], device: str) -> tuple[dict, dict, dict]:
    # (eager, exact, the exact result of absolute values). Kept, since several back ends are held against one problem.
    t = {k: v.to(device) for k, v in problem.tensors().items()}
    double = {k: v.double() for k, v in t.items()}
    absolute = {k: v.abs() for k, v in double.items()}
    return (
        _run(problem.eager, t, names),
        _run(problem.oracle, double, names),
        _run(lambda leaves: problem.oracle(leaves, absolute=True), absolute, names),
    )


def compare(problem: Problem, device: str = "cpu") -> list[Row]:
    """One row for y and one for each gradient, with the back end that the settings choose: one draw.

    ``device``: where all is computed. A problem's tensors are the same everywhere.
    """
    t = {k: moved(v, device) for k, v in problem.tensors().items()}
    names = tuple(n for n in t if n not in ("weight", "dy") and n not in problem.frozen)
    ours = run_ours(problem, t, names)
    theirs, exact, absolute = _expected(problem, names, device)
    return [judged(name, ours[name], theirs[name], exact[name], absolute[name]) for name in exact]


def check(problem: Problem, device: str = "cpu") -> list[Row]:
    """As ``compare``; an output of few elements that is over its bound is judged on more draws."""
    rows = {row.output: row for row in compare(problem, device)}
    few = {name for name, row in rows.items() if not row.ok and 0 < row.elements < FEW and math.isfinite(row.ratio)}
    draw = 0
    while any(rows[name].elements < FEW for name in few) and draw < DRAWS:
        draw += 1
        for row in compare(replace(problem, seed=problem.seed + draw * 1_000_003), device):
            if row.output in few:
                rows[row.output] = _pooled(rows[row.output], row)
    return list(rows.values())


def _pooled(a: Row, b: Row) -> Row:
    def both(p: tuple[float, float], q: tuple[float, float]) -> tuple[float, float]:
        square = (p[0] ** 2 * a.elements + q[0] ** 2 * b.elements) / (a.elements + b.elements)
        return math.sqrt(square), max(p[1], q[1])

    pairs = ((a.error, b.error), (a.eager, b.eager), (a.floor, b.floor))
    return Row(a.output, a.elements + b.elements, *(both(p, q) for p, q in pairs))


def _norms(error: Tensor) -> tuple[float, float]:
    if error.numel() == 0:
        return 0.0, 0.0
    return error.square().mean().sqrt().item(), error.abs().max().item()


def judged(name: str, ours: Tensor, theirs: Tensor, exact: Tensor, absolute: Tensor) -> Row:
    if ours.shape != exact.shape or ours.dtype != theirs.dtype:
        raise AssertionError(f"{name}: {ours.dtype} {tuple(ours.shape)}, expected {theirs.dtype} {tuple(exact.shape)}")
    dtype = ours.dtype
    floor = ulp(exact, dtype) * (4.0 if dtype == torch.float32 else 0.5) + 0.5 * ulp(absolute, torch.float32)
    errors = ours.double() - exact, theirs.double() - exact, floor
    return Row(name, exact.numel(), *(_norms(e) for e in errors))

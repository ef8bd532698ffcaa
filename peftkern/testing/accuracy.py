"""Error against an fp64 oracle, judged by the error that eager PyTorch makes.

Two independent statements of the equation live here, both in plain torch with autograd, neither taken from the ops:
the oracle in fp64, and eager, which is the order of operations of HF PEFT in the dtypes of the call. A product of
half-precision matrices is written as product of their fp32 values, rounded: the same result as a native one that
accumulates in fp32, at fp32 speed on every CPU.

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

import torch
from torch import Tensor

from ..autograd.lora_linear import lora_linear
from ..ops.dropout_mask import dropout_mask_ref
from .problems import LoRALinearProblem

FACTOR = 1.5
FEW, DRAWS = 256, 64
DROPOUT_SEED = 0x5EED_0F_D20B_0075

_SIGNIFICANT_BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
_SMALLEST_ULP = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


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


def oracle(t: dict[str, Tensor], scaling: float, keep: Tensor | None, dropout_p: float) -> Tensor:
    """The equation in the tensors' own dtype (fp64)."""
    x = t["x"].flatten(0, -2)
    dropped = x if keep is None else torch.where(keep, x / (1 - dropout_p), torch.zeros_like(x))
    one = torch.ones((), dtype=x.dtype)
    u = (dropped * t.get("delta_in_scale", one)) @ t["lora_A"].T
    delta = scaling * ((u * t.get("rank_scale", one)) @ t["lora_B"].T)
    base = (x * t.get("base_in_scale", one)) @ t["weight"].T
    y = base * t.get("base_out_scale", one) + delta * t.get("delta_out_scale", one) + t.get("bias", 0.0)
    return y.unflatten(0, t["x"].shape[:-1])


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float().T).to(a.dtype)


def _scale(a: Tensor, vector: Tensor | None) -> Tensor:
    return a if vector is None else (a.float() * vector.float()).to(a.dtype)


def eager(t: dict[str, Tensor], scaling: float, keep: Tensor | None, dropout_p: float) -> Tensor:
    """PEFT's order: base, cast to the adapters' dtype, dropout, A, B, scaling, sum, cast back; vectors as in VeRA."""
    x = t["x"].flatten(0, -2)
    base = _scale(_mm(_scale(x, t.get("base_in_scale")), t["weight"]), t.get("base_out_scale"))
    z = x.to(t["lora_A"].dtype)
    if keep is not None:
        z = torch.where(keep, z / (1 - dropout_p), torch.zeros((), dtype=z.dtype))
    u = _scale(_mm(_scale(z, t.get("delta_in_scale")), t["lora_A"]), t.get("rank_scale"))
    delta = _scale(_mm(u, t["lora_B"]) * scaling, t.get("delta_out_scale"))
    if "bias" in t:
        base = (base + t["bias"]).to(base.dtype)
    return (base + delta).to(x.dtype).unflatten(0, t["x"].shape[:-1])


def _run(
    function: Callable[[dict[str, Tensor]], Tensor], t: dict[str, Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    leaves = {k: v.detach().requires_grad_(k in names) for k, v in t.items() if k != "dy"}
    y = function(leaves)
    grads = torch.autograd.grad(y, [leaves[n] for n in names], t["dy"].to(y.dtype)) if names else ()
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(names, grads, strict=True)}}


def run_ours(problem: LoRALinearProblem, t: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """y and the gradients of ``names`` from ``peftkern.lora_linear``."""

    def call(leaves: dict[str, Tensor]) -> Tensor:
        leaves = dict(leaves)
        args = [leaves.pop(k) for k in ("x", "weight", "lora_A", "lora_B")]
        return lora_linear(
            *args, scaling=problem.scaling, dropout_p=problem.dropout_p, training=True, seed=DROPOUT_SEED, **leaves
        )  # fmt: skip

    return _run(call, t, names)


@functools.lru_cache(maxsize=1)
def _expected(problem: LoRALinearProblem, names: tuple[str, ...]) -> tuple[dict, dict, dict]:
    # (eager, exact, the exact result of absolute values). Kept, since several back ends are held against one problem.
    t, p = problem.tensors(), problem.dropout_p
    keep = dropout_mask_ref(torch.tensor([DROPOUT_SEED]), problem.M, problem.K, p) if p else None
    double = {k: v.double() for k, v in t.items()}
    absolute = {k: v.abs() for k, v in double.items()}
    return (
        _run(lambda leaves: eager(leaves, problem.scaling, keep, p), t, names),
        _run(lambda leaves: oracle(leaves, problem.scaling, keep, p), double, names),
        _run(lambda leaves: oracle(leaves, abs(problem.scaling), keep, p), absolute, names),
    )


def compare(problem: LoRALinearProblem) -> list[Row]:
    """One row for y and one for each gradient, with the back end that the settings choose: one draw."""
    t = problem.tensors()
    names = tuple(n for n in t if n not in ("weight", "dy") and n not in problem.frozen)
    ours = run_ours(problem, t, names)
    theirs, exact, absolute = _expected(problem, names)
    return [_row(name, ours[name], theirs[name], exact[name], absolute[name]) for name in exact]


def check(problem: LoRALinearProblem) -> list[Row]:
    """As ``compare``; an output of few elements that is over its bound is judged on more draws."""
    rows = {row.output: row for row in compare(problem)}
    few = {name for name, row in rows.items() if not row.ok and 0 < row.elements < FEW and math.isfinite(row.ratio)}
    draw = 0
    while any(rows[name].elements < FEW for name in few) and draw < DRAWS:
        draw += 1
        for row in compare(replace(problem, seed=problem.seed + draw * 1_000_003)):
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


def _row(name: str, ours: Tensor, theirs: Tensor, exact: Tensor, absolute: Tensor) -> Row:
    if ours.shape != exact.shape or ours.dtype != theirs.dtype:
        raise AssertionError(f"{name}: {ours.dtype} {tuple(ours.shape)}, expected {theirs.dtype} {tuple(exact.shape)}")
    dtype = ours.dtype
    floor = ulp(exact, dtype) * (4.0 if dtype == torch.float32 else 0.5) + 0.5 * ulp(absolute, torch.float32)
    errors = ours.double() - exact, theirs.double() - exact, floor
    return Row(name, exact.numel(), *(_norms(e) for e in errors))

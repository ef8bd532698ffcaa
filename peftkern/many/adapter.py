"""Adapter: what one entry of a list of adapters may be made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from ..activations import activation_name
from ..checks import FLOATING, accumulate_dtype, check_fits
from ..equation import COEFFICIENTS, fold, place
from ..ops.adapter_table import BESIDE, BETA, RANK_BIAS

_AXES = {c.name: place(c.symbol).axis for c in COEFFICIENTS} | {"bias": "N", "rank_bias": "R"}
# The argument that gives each vector, by the vector's symbol.
ARGUMENTS = {c.symbol: c.name for c in COEFFICIENTS} | {BETA: "bias", RANK_BIAS: "rank_bias"}


@dataclass(frozen=True, init=False, eq=False)
class Adapter:
    """One adapter of any method that is the equation's coefficients; immutable.

        y = g_b * Base(x * p_b) + scaling * g_d * ((d * f((drop(x) * p_d) A^T + rank_bias)) B^T) + bias

    Args:
        lora_A: (R, K). lora_B: (N, R). Both may be None: there is no branch then, as in (IA)^3.
        scaling: a float.
        bias: (N), takes the place of the layer's own bias.
        rank_bias: (R). activation: f, of peftkern/activations.py.
        coefficients: rank_scale (R), base_in_scale (K), delta_in_scale (K), base_out_scale (N), delta_out_scale (N) and
            whatever else has a row in peftkern/equation.py; 1 where they are not given.

    DoRA: base_out_scale = delta_out_scale = magnitude / norm. VeRA: rank_scale and delta_out_scale, lora_A and lora_B
    being those of all adapters. (IA)^3: base_in_scale, or base_out_scale and bias = base_out_scale * the layer's bias.
    A bottleneck adapter: an activation, on the base ``identity``.

    Raises:
        TypeError: a name that is no coefficient, or lora_A without lora_B. ValueError: an unknown activation. What does not
            fit a layer is found by the call
            that takes the adapter.
    """

    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float
    bias: Tensor | None
    rank_bias: Tensor | None
    activation: str
    coefficients: Mapping[str, Tensor | None] = field(repr=False)

    def __init__(
        self, lora_A: Tensor | None = None, lora_B: Tensor | None = None, scaling: float = 1.0, *,
        bias: Tensor | None = None, rank_bias: Tensor | None = None, activation: str = "identity",
        **coefficients: Tensor | None,
    ):  # fmt: skip
        for name in coefficients:
            if name not in _AXES:
                raise TypeError(f"{name} is no coefficient of an adapter; there are {', '.join(_AXES)}")
        if (lora_A is None) != (lora_B is None):
            raise TypeError(f"{'lora_B' if lora_A is None else 'lora_A'} is given alone: lora_A and lora_B go together")
        values = {n: v for n, v in coefficients.items() if v is not None}
        for name, value in dict(
            lora_A=lora_A,
            lora_B=lora_B,
            scaling=scaling,
            bias=bias,
            rank_bias=rank_bias,
            activation=activation_name(activation),
            coefficients=MappingProxyType(values),
        ).items():
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple:
        # The view of a dictionary has no pickle.
        rest = {"bias": self.bias, "rank_bias": self.rank_bias, "activation": self.activation, **self.coefficients}
        return _made, (type(self), self.lora_A, self.lora_B, self.scaling, rest)

    def beside(self) -> list[str]:
        """The names of what acts on the base."""
        acting = [c.name for c in COEFFICIENTS if c.name in self.coefficients and c.symbol in BESIDE]
        return acting if self.bias is None else [*acting, "bias"]


def vectors_of(
    where: str, adapter: Adapter, like: Tensor, sizes: Mapping[str, int], anywhere: bool = False
) -> dict[str, Tensor]:
    """The vectors of an adapter by symbol, in the dtype of sums over ``like``; differentiable.

    ``sizes``: of the axes R, K and N. ``anywhere``: they may be on other devices than ``like``. Raises TypeError or
    ValueError with the name after ``where``.
    """
    if not adapter.coefficients and adapter.bias is None and adapter.rank_bias is None:
        return {}
    given = {**adapter.coefficients, "bias": adapter.bias, "rank_bias": adapter.rank_bias}
    for name, value in given.items():
        if value is not None:
            axis = _AXES[name]
            device = value.device if anywhere and isinstance(value, Tensor) else like.device
            check_fits(where + name, value, (sizes[axis],), f"({axis},)", device, FLOATING)
    found = fold(adapter.coefficients, like)._asdict() | {BETA: adapter.bias, RANK_BIAS: adapter.rank_bias}
    return {symbol: v.to(accumulate_dtype(like.dtype)) for symbol, v in found.items() if v is not None}


def _made(cls: type, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, rest: dict) -> Adapter:
    return cls(lora_A, lora_B, scaling, **rest)

"""LoKr (Yeh et al. 2023) on a linear layer, as HF PEFT computes it: the change of the weight is a Kronecker product.

    y = x W^T + s * kron(w1, w2) x + bias

w1 (I, P), w2 (J, Q) with I J = N and P Q = K, each whole or a product of two of rank R. In training rank dropout sets
rows of the change to zero, the same ones for all of x, and module dropout leaves it out altogether, by a draw on the CPU.
KronA (Edalati et al. 2022) is the same equation with both factors whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...autograd.maps.kron import add_kron
from ...bases.base import Base
from .. import tuner
from ..linear import Linear, Scaled, frozen_weight, run
from ..look import Look, NotCovered
from ..registry import Held, Method, register

Factor = Tensor | tuple[Tensor, Tensor]


class Kron(NamedTuple):
    """The term s * kron(w1, w2) x."""

    w1: Tensor
    w2: Factor
    scaling: float

    def onto(self, y: Tensor, x: Tensor) -> Tensor:
        """See ``Term``."""
        return add_kron(y, x, *self)


def _kron(w1: Factor, w2: Factor, scaling: float) -> Kron:
    return Kron(w1[0] @ w1[1] if isinstance(w1, tuple) else w1, w2, scaling)


def _named(name: str, factor: Factor, rows: str, columns: str, rank: str) -> dict[str, tuple[Tensor, str]]:
    if not isinstance(factor, tuple):
        return {name: (factor, f"{rows} {columns}")}
    return {f"{name}[0]": (factor[0], f"{rows} {rank}"), f"{name}[1]": (factor[1], f"{rank} {columns}")}


def lokr_linear(
    x: Tensor,
    weight: Tensor | Base,
    lokr_w1: Factor,
    lokr_w2: Factor,
    *,
    bias: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """A frozen linear layer with LoKr or KronA: the equation at the top of peftkern/methods/kronecker/lokr.py.

    Args:
        x: (..., K). weight: (N, K). bias: (N). lokr_w1: (I, P), or (I, R) and (R, P) whose product it is.
            lokr_w2: (J, Q), or (J, R) and (R, Q). I J = N, P Q = K.

    Returns (..., N). Raises as ``lora_linear`` does, and ValueError for factors that do not fit.
    """
    w1, w2 = _named("lokr_w1", lokr_w1, "I", "P", "R1"), _named("lokr_w2", lokr_w2, "N/I", "K/P", "R2")
    weight = frozen_weight(weight, bias, **w1, **w2)
    return run(Linear(weight, bias).add_term(_kron(lokr_w1, lokr_w2, scaling)), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``lokr.Linear`` holds of an adapter."""
    found = []
    for factor in ("lokr_w1", "lokr_w2"):
        names = [factor] if look.part(factor).holds(name) else [f"{factor}_a", f"{factor}_b"]
        found.append(tuner.tensors(look, name, dict.fromkeys(names, (None, None))))
    w1, w2 = found
    if len({t.dtype for t in w1 + w2}) > 1:
        raise NotCovered(f"the tensors of {name!r} differ in dtype")
    scaling = tuner.number(look.item("scaling", name), name)
    if isinstance(scaling, Tensor):
        raise NotCovered(f"the scaling of {name!r} is a tensor")
    numbers = (len(w1), scaling, 0.0, False, 0.0)
    if look.value("training"):
        dropouts = [look.item(of, name) for of in ("rank_dropout", "rank_dropout_scale", "module_dropout")]
        numbers = (*numbers[:2], *dropouts)
    return Held(name, LOKR, (*w1, *w2), numbers)


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    parts, scaling, rank_dropout, divides, module_dropout = adapter.numbers
    # The library's draws, in its order; it makes the first one without any dropout too.
    if (module_dropout or rank_dropout) and torch.rand(1) <= module_dropout:
        return y
    w1, w2 = (t if len(t) > 1 else t[0] for t in (adapter.tensors[:parts], adapter.tensors[parts:]))
    term = _kron(w1, w2, scaling)
    if not rank_dropout:
        return y.add_term(term)
    left = (torch.rand(y.weight.shape[0]) > rank_dropout).float()
    if divides:
        left /= left.mean()
    return y.add_term(Scaled(term, left.to(y.weight.device)))


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(**options):
        return peft.LoKrConfig(**{"target_modules": ["0"], "r": 2, "alpha": 3, "init_weights": False, **options})

    K, N = in_features, out_features
    return {
        "low rank": tuner.layer(nn.Linear(K, N), config(r=1, decompose_factor=2)),
        "no bias, both of low rank": tuner.layer(
            nn.Linear(K, N, bias=False), config(r=1, decompose_both=True, decompose_factor=4)
        ),
        "both whole": tuner.layer(nn.Linear(K, N), config(r=8)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(r=5, alpha=9)),
    }


LOKR = register(
    Method(
        name="LoKr",
        taxonomy="reparameterised",
        family="S",
        layer="peft.tuners.lokr.layer.Linear",
        adapters="lokr_w1 lokr_w1_a",
        held=held,
        apply=apply,
        function=lokr_linear,
        examples=examples,
        build=tuner.builder("LoKrConfig"),
        op="lora_linear",
        saves="x",
        merges="W + s kron(w1, w2)",
        peft_type="LOKR",
        keeps_dtype=True,
        loses_small=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

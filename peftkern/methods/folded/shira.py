"""SHiRA (Bhardwaj et al. 2024) on a linear layer, as HF PEFT computes it: some entries of the weight train.

    y = x (W + s S)^T + bias        S: shira_weight (n) at shira_indices (2, n), rows and columns

The change is rounded to W's dtype, as the library rounds it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...autograd.shapes import cast
from ...checks import check_parts, check_scaling
from .. import tuner
from ..exact import made_of, places
from ..linear import Linear, run
from ..look import Look
from ..registry import Held, Method, register


def _with(y: Linear, values: Tensor, indices: Tensor, scaling: float | Tensor) -> Linear:
    weight = y.whole_weight()
    at = made_of(indices, _whole_numbers)
    return y._replace(folded=weight.index_put(at, cast(values * scaling, weight.dtype), accumulate=True))


def _whole_numbers(indices: Tensor) -> tuple[Tensor, ...]:
    return indices.to(torch.int64, copy=True).unbind()


def shira_linear(
    x: Tensor, weight: Tensor, shira_weight: Tensor, shira_indices: Tensor, *, bias: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with SHiRA: the equation at the top of peftkern/methods/folded/shira.py.

    Args:
        x: (..., K). weight: (N, K). shira_weight: (n). shira_indices: (2, n), whole numbers; what names an entry twice adds
            up. bias: (N). scaling: s.

    Returns (..., N). Raises as ``lora_linear`` does. Saved for backward: x and the folded weight, in W's dtype.
    """
    check_parts(
        weight, bias, shira_weight=(shira_weight, "n"), shira_indices=(shira_indices, "2 n", tuple(weight.shape))
    )
    check_scaling(scaling, weight)
    return run(_with(Linear(weight, bias), shira_weight, shira_indices, scaling), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``shira.Linear`` holds of an adapter."""
    (values,) = tuner.tensors(look, name, {"shira_weight": (None,)})
    scaling = tuner.number(look.item("scaling", name), name)
    return Held(name, SHIRA, (values, places(look, "shira_indices", name, values)), (scaling,))


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return _with(y, *adapter.tensors, *adapter.numbers)


def build(linear: nn.Linear, rank: int) -> nn.Module:
    """A model of one layer around this one: as many numbers as a LoRA of this rank has, and no more than the weight's."""
    N, K = linear.weight.shape
    return tuner.builder("ShiraConfig")(linear, max(1, min(rank, N * K // (N + K))))


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(**options):
        return peft.ShiraConfig(**{"target_modules": ["0"], "r": 3, "init_weights": False, **options})

    K, N = in_features, out_features
    models = {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(r=2)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(random_seed=3)),
        "scaled": tuner.layer(nn.Linear(K, N), config()),
    }
    models["scaled"].base_model.model[0].set_scale("default", 0.7)
    return models


SHIRA = register(
    Method(
        name="SHiRA",
        taxonomy="selective",
        family="S",
        layer="peft.tuners.shira.layer.Linear",
        adapters="shira_weight",
        held=held,
        apply=apply,
        function=shira_linear,
        examples=examples,
        build=build,
        rank=32,
        op="lora_linear",
        saves="x, and the folded weight",
        merges="W + s S",
        peft_type="SHIRA",
        dense=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

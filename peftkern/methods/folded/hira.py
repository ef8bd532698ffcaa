"""HiRA (Huang et al. 2025) on a linear layer, as HF PEFT computes it: the weight times a matrix of low rank, entry by entry.

    y = x (W + W * (B A))^T + bias

One product with the folded weight, where the library has a second one. With dropout in front of the second there are two, and
the library's own code runs. Merging there adds W * (B A) too.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...checks import check_parts
from .. import tuner
from ..exact import product, refuse_half
from ..linear import Linear, run
from ..look import Look, NotCovered
from ..registry import Held, Method, register


def _with(y: Linear, A: Tensor, B: Tensor) -> Linear:
    return y.fold(y.weight * product(B, A))


def hira_linear(x: Tensor, weight: Tensor, hira_A: Tensor, hira_B: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """A frozen linear layer with HiRA: the equation at the top of peftkern/methods/folded/hira.py.

    Args:
        x: (..., K). weight: (N, K). hira_A: (R, K). hira_B: (N, R). bias: (N). dtypes as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does. Saved for backward: x and the folded weight, in fp32.
    """
    check_parts(weight, bias, hira_A=(hira_A, "R K"), hira_B=(hira_B, "N R"))
    return run(_with(Linear(weight, bias), hira_A, hira_B), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``hira.Linear`` holds of an adapter."""
    A, B = tuner.tensors(look, name, {"hira_A": (None, shape[1]), "hira_B": (shape[0], None)})
    refuse_half(name, A)
    if tuner.drop_probability(look, "hira_dropout", name):
        raise NotCovered("HiRA with dropout takes two products with the weight in any case")
    return Held(name, HIRA, (A, B), rank=A.shape[0])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return _with(y, *adapter.tensors)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft
    from transformers.pytorch_utils import Conv1D

    def config(**options):
        return peft.HiraConfig(**{"target_modules": ["0"], "r": 4, "init_weights": False, **options})

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(r=7)),
        "Conv1D": tuner.layer(Conv1D(N, K), config(fan_in_fan_out=True)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(r=3)),
    }


HIRA = register(
    Method(
        name="HiRA",
        taxonomy="reparameterised",
        family="S",
        layer="peft.tuners.hira.layer.Linear",
        adapters="hira_A",
        held=held,
        apply=apply,
        function=hira_linear,
        examples=examples,
        build=tuner.builder("HiraConfig"),
        rank=32,
        op="lora_linear",
        saves="x, and the folded weight in fp32",
        merges="W + W * (B A)",
        peft_type="HIRA",
        dense=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

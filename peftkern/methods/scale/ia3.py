"""(IA)^3 (Liu et al. 2022) on a linear layer, as HF PEFT computes it: one vector, of the output or of the input.

    y = l * (x W^T + bias)        l (N), the bias included
    y = (x * l) W^T + bias        l (K), of a feed-forward layer

Vectors of several adapters are multiplied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...bases.base import Base
from ...checks import FLOATING, accumulate_dtype, check_fits
from .. import tuner
from ..linear import Linear, frozen_weight, run, times
from ..look import Look
from ..registry import Held, Method, register
from ..stored import Settings, Stored, Unfit, check_names


def with_ia3(y: Linear, ia3_l: Tensor, is_feedforward: bool) -> Linear:
    """The layer with one more vector."""
    if is_feedforward:
        return y._replace(p_b=times(y.p_b, ia3_l))
    bias = y.bias
    if bias is not None:
        for name, vector in (("ia3_l", ia3_l), ("bias", bias)):  # a product would broadcast
            check_fits(name, vector, y.weight.shape[:1], "(N,)", y.weight.device, FLOATING)
        bias = bias.to(accumulate_dtype(bias.dtype)) * ia3_l
    return y.scaled(ia3_l)._replace(bias=bias)


def ia3_linear(
    x: Tensor, weight: Tensor | Base, ia3_l: Tensor, *, bias: Tensor | None = None, is_feedforward: bool = False
) -> Tensor:
    """A frozen linear layer with (IA)^3: the equation at the top of peftkern/methods/ia3.py.

    Args:
        x: (..., K). weight: (N, K). bias: (N). ia3_l: (N) or (N, 1); with ``is_feedforward`` (K) or (1, K).
            In fp32 or x's dtype.

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    weight = frozen_weight(weight, bias, ia3_l=(ia3_l, "K|1 K" if is_feedforward else "N|N 1"))
    return run(with_ia3(Linear(weight, bias), ia3_l.flatten(), is_feedforward), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``ia3.Linear`` holds of an adapter."""
    inside = look.value("is_feedforward")
    return Held(
        name, IA3, tuple(tuner.tensors(look, name, {"ia3_l": (1, shape[1]) if inside else (shape[0], 1)})), (inside,)
    )


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return with_ia3(y, adapter.tensors[0].flatten(), *adapter.numbers)


def _inside(settings: Settings, module: str) -> bool:
    # A feed-forward layer is one whose name ends like this, be it in the middle of a word, or fits the pattern.
    names = settings["feedforward_modules"]
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module.endswith(name) for name in names)


def _check(settings: Settings) -> None:
    check_names(settings, "feedforward_modules")
    if settings["feedforward_modules"] is None:
        raise Unfit("feedforward_modules", "is missing: PEFT's choice by the type of the model is not made here")


STORED = Stored(
    names=("ia3_l",),
    shapes=lambda settings, module: {"ia3_l": "1K" if _inside(settings, module) else "N1"},
    take=lambda settings, module, tensors: ((tensors["ia3_l"],), (_inside(settings, module),)),
    reads={"feedforward_modules": None},
    check=_check,
    ignores={"init_ia3_weights"},
    base=lambda settings: True,
)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft
    from transformers.pytorch_utils import Conv1D

    def config(inside: bool = False, **options):
        return peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if inside else [], **options)

    K, N = in_features, out_features
    models = {
        "output": tuner.layer(nn.Linear(K, N), config()),
        "input": tuner.layer(nn.Linear(K, N), config(True)),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config()),
        "Conv1D": tuner.layer(Conv1D(N, K), config(fan_in_fan_out=True)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config()),
        "a zero": tuner.layer(nn.Linear(K, N), config()),
    }
    for model in models.values():
        for vector in model.base_model.model[0].ia3_l.values():
            torch.nn.init.uniform_(vector, 0.5, 2.0)
    models["a zero"].base_model.model[0].ia3_l["default"].data[3] = 0.0
    return models


IA3 = register(
    Method(
        name="(IA)^3",
        taxonomy="additive",
        family="L",
        layer="peft.tuners.ia3.layer.Linear",
        also=("peft.tuners.ia3.bnb.Linear8bitLt", "peft.tuners.ia3.bnb.Linear4bit"),
        adapters="ia3_l",
        held=held,
        apply=apply,
        function=ia3_linear,
        examples=examples,
        build=tuner.builder("IA3Config", None, feedforward_modules=[]),
        rank=0,
        op="lora_linear",
        coefficients=("p_b", "g_b"),
        saves="x W^T (M, N) for a vector of the output, x for one of the input",
        merges="l * W and l * bias, or W * l",
        peft_type="IA3",
        stored=STORED,
        loses_small=True,
        widens=True,
        tested={"peft": ((0, 21), (0, 21)), "adapters": ((1, 3), (1, 3))},
    )
)

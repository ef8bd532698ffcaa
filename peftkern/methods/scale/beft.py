"""BEFT on a linear layer, as HF PEFT computes it: the bias, and a second one that trains. BitFit trains the bias itself.

y = x W^T + bias + b        b (N), one for each adapter
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .. import tuner
from ..linear import Linear
from ..look import Look
from ..registry import Held, Method, register
from ..stored import Stored


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``beft.Linear`` holds of an adapter."""
    return Held(name, BEFT, tuple(tuner.tensors(look, name, {"beft_bias": (1, shape[0])})))


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return y.add_bias(adapter.tensors[0].flatten())


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    K, N = in_features, out_features
    config = peft.BeftConfig(target_modules=["0"])
    models = {
        "linear": tuner.layer(nn.Linear(K, N), config),
        "two adapters": tuner.layer(nn.Linear(K, N), config, config),
    }
    for model in models.values():
        for b in model.base_model.model[0].beft_bias.values():
            torch.nn.init.normal_(b)
    return models


BEFT = register(
    Method(
        name="BEFT",
        taxonomy="selective",
        family="L",
        layer="peft.tuners.beft.layer.Linear",
        adapters="beft_bias",
        held=held,
        apply=apply,
        examples=examples,
        build=tuner.builder("BeftConfig", None),
        rank=0,
        op="lora_linear",
        saves="nothing",
        merges="bias + b",
        peft_type="BEFT",
        stored=Stored(
            names=("beft_bias",),
            shapes=lambda settings, module: {"beft_bias": "1N"},
            take=lambda settings, module, tensors: ((tensors["beft_bias"],), ()),
            ignores={"init_weights"},
            base=lambda settings: True,
        ),
        loses_small=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

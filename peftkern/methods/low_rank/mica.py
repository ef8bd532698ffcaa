"""MiCA on a linear layer, as HF PEFT computes it: LoRA whose lora_B, minor singular vectors of W, is frozen.

y = x W^T + s B (A drop(x)) + bias
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .. import tuner
from ..look import Look
from ..registry import Held, Method, register
from . import lora


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``lora.Linear`` holds of a MiCA adapter."""
    return lora.read(look, name, shape, MICA)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    return {"linear": tuner.layer(nn.Linear(in_features, out_features), lora.config(init_lora_weights="mica"))}


MICA = register(
    Method(
        name="MiCA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.lora.variants.MiCALinearVariant",
        variant=True,
        held=held,
        apply=lora.apply,
        examples=examples,
        build=tuner.builder("LoraConfig", init_lora_weights="mica"),
        op="lora_linear",
        saves="x",
        merges="W + s B A",
        tested={"peft": ((0, 21), (0, 21))},
    )
)

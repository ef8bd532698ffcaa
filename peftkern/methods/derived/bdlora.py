"""BD-LoRA on a linear layer, as HF PEFT computes it: LoRA with one of its matrices block diagonal.

    y = x W^T + s * (B (A drop(x)) + bias_B) + bias,    A or B = diag(blocks)

The blocks lie one below the other, A as (R, K / blocks), B as (N, R / blocks).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .. import tuner
from ..linear import Linear
from ..look import Look, NotCovered
from ..low_rank import lora
from ..registry import Held, Method, loaded, register


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``lora.Linear`` holds of a BD-LoRA adapter: LoRA's tensors, and of how many blocks each matrix is."""
    tensors, blocks = [], []
    for held_by in ("lora_A", "lora_B"):
        part = look.part(held_by).part(name)
        of_blocks = type(part.module) is not nn.Linear
        part.require(loaded("peft.tuners.lora.variants.BlockDiagonalLinear") if of_blocks else nn.Linear, held_by)
        blocks.append(part.value("nblocks") if of_blocks else 1)
        tensors += [part.tensor("weight"), part.tensor("bias") if not of_blocks else None]
    A, bias_A, B, bias = tensors
    if bias_A is not None or any(not tuner.plain_or_none(t) or (t is not None and t.dtype != A.dtype) for t in tensors):
        raise NotCovered(f"lora_A of {name!r} has a bias, or its tensors differ in dtype, or are not plain")
    scaling, p = tuner.number(look.item("scaling", name), name), tuner.drop_probability(look, "lora_dropout", name)
    return Held(name, BDLORA, (A, B, bias), (scaling, *blocks), p, A.shape[0])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    (A, B, bias), (scaling, *blocks) = adapter.tensors, adapter.numbers
    A, B = (t if n == 1 else torch.block_diag(*t.chunk(n)) for t, n in zip((A, B), blocks))
    return lora.apply(y, adapter._replace(tensors=(A, B, bias), numbers=(scaling,)))


def build(linear: nn.Linear, rank: int) -> nn.Module:
    """A model of one layer around this one."""
    return tuner.layer(linear, _config(r=rank))


def _config(blocks: int = 2, which: str = "target_modules_bd_a", **options):
    from peft.tuners.lora import BdLoraConfig

    return lora.config(use_bdlora=BdLoraConfig(nblocks=blocks, **{which: ["0"]}), **options)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    K, N, of_B = in_features, out_features, "target_modules_bd_b"
    models = {
        "lora_A in blocks": tuner.layer(nn.Linear(K, N), _config(2)),
        "lora_B in blocks, no bias": tuner.layer(nn.Linear(K, N, bias=False), _config(2, of_B)),
        "lora_bias": tuner.layer(nn.Linear(K, N), _config(lora_bias=True)),
        "after LoRA": tuner.layer(nn.Linear(K, N), lora.config(), _config(2, of_B, r=6)),
    }
    for model in models.values():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
    return models


BDLORA = register(
    Method(
        name="BD-LoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.lora.variants.BdLoraLinearVariant",
        variant=True,
        held=held,
        apply=apply,
        examples=examples,
        build=build,
        op="lora_linear",
        saves="x, (M, R) in fp32, and lora_A or lora_B with its zeros",
        merges="W + s B A",
        makes=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

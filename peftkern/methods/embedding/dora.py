"""DoRA on an embedding: y = f * c (E[ids] + s * B A[:, ids]),   f = m / n

n[o] is the norm of column o of E + s (BA)^T, without the scale c, taken as a constant.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...autograd.row_norm import row_norm
from ...checks import accumulate_dtype
from .. import tuner
from ..look import PLAIN_TENSORS, Look, NotCovered
from ..low_rank.lora import config
from ..registry import Held, Method, register
from . import lora
from .layer import Embedding


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``lora.Embedding`` holds of a DoRA adapter: LoRA's tensors, and the magnitudes."""
    adapter = lora.read(look, name, shape, DORA)
    table, dtype = look.part("base_layer").tensor("weight", frozen=True).dtype, adapter.tensors[0].dtype
    if dtype not in (table, torch.float32):
        raise NotCovered(f"adapter {name!r} is {dtype}, the embedding is {table}")
    if not tuner.alone(look):
        raise NotCovered(f"adapter {name!r} is DoRA, and there are other active adapters")
    part = look.part("lora_magnitude_vector").part(name)
    magnitude = None if part is None else part.tensor("weight")
    if type(magnitude) not in PLAIN_TENSORS or magnitude.shape != shape[1:]:
        raise NotCovered(f"the magnitudes of {name!r} are no plain tensor of {shape[1]} elements")
    return adapter._replace(tensors=(*adapter.tensors, magnitude))


def apply(y: Embedding, adapter: Held) -> Embedding:
    """The layer with this adapter."""
    (A, B, _, m), (scaling, _) = adapter.tensors, adapter.numbers
    f = m.to(accumulate_dtype(m.dtype)) / row_norm(y.weight.t(), A, B, scaling)
    return lora.apply(y, adapter)._replace(f=f)


def examples(V: int, N: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    found = lora.models(V, N, lambda **options: config(use_dora=True, **options))
    for model in found.values():
        for magnitudes in model.base_model.model[0].lora_magnitude_vector.values():
            torch.nn.init.uniform_(magnitudes.weight, 0.5, 2.0)
    return found


DORA = register(
    Method(
        name="DoRA of embeddings",
        of="DoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.lora.variants.DoraEmbeddingVariant",
        variant=True,
        held=held,
        apply=apply,
        examples=examples,
        inputs=lora.inputs,
        build=tuner.builder("LoraConfig", use_dora=True),
        op="embedding",
        saves="as LoRA, and the output without magnitudes",
        merges="f * (E + s (B A)^T)",
        tested={"peft": ((0, 21), (0, 21))},
    )
)

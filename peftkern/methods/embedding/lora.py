"""LoRA on an embedding: y = c (E[ids] + sum over adapters of s * B A[:, ids]), whose adapters drop nothing.

lora_embedding_A is (R, V), lora_embedding_B (N, R), in fp32 or the table's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import tuner
from ..look import Look, NotCovered
from ..low_rank import lora
from ..registry import Held, Method, register
from .layer import Embedding, base, scale


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``lora.Embedding`` holds of an adapter: LoRA, or DoRA."""
    method = lora.variant(look, name)
    return read(look, name, shape, LORA) if method is None else method.held(look, name, shape)


def read(look: Look, name: str, shape: tuple[int, int], method: Method) -> Held:
    """The matrices and the scaling of an adapter, and the table's scale."""
    V, N = shape
    A, B = tuner.tensors(look, name, {"lora_embedding_A": (None, V), "lora_embedding_B": (N, None)})
    if A.shape[0] != B.shape[1]:
        raise NotCovered(f"the shapes of {name!r} do not fit: {tuple(A.shape)} and {tuple(B.shape)}")
    if any(look.item(functions, name) is not None for functions in ("input_fns", "output_fns")):
        raise NotCovered("the embedding is sharded for tensor parallelism")
    scaling, c = tuner.number(look.item("scaling", name), name), scale(look)
    table = c if isinstance(c, Tensor) else None
    return Held(name, method, (A, B, table), (scaling, None if table is not None else c), 0.0, A.shape[0])


def apply(y: Embedding, adapter: Held) -> Embedding:
    """The layer with this adapter."""
    (A, B, table, *_), (scaling, number) = adapter.tensors, adapter.numbers
    return y.add(A, B, scaling, number if table is None else table)


def models(V: int, N: int, config) -> dict[str, nn.Module]:
    """Models of one layer: plain, padded, and with a number or a tensor as its scale."""
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return {
        "embedding": tuner.layer(nn.Embedding(V, N), config()),
        "padded": tuner.layer(nn.Embedding(V, N, padding_idx=-3), config(use_rslora=True)),
        "scaled by a number": tuner.layer(BartScaledWordEmbedding(V, N, 1, embed_scale=N**0.5), config()),
        "scaled by a tensor": tuner.layer(Gemma3TextScaledWordEmbedding(V, N, 0, embed_scale=N**0.5), config()),
    }


def inputs(model: nn.Module, V: int) -> list[Tensor]:
    """Ids that occur several times, of one sequence, of several, of none."""
    return [torch.randint(0, V, shape) for shape in ((5,), (2, 30), (3, 2, 7), (0,))]


def examples(V: int, N: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    frozen = tuner.layer(nn.Embedding(V, N), lora.config())
    frozen.base_model.model[0].lora_embedding_A.requires_grad_(False)
    return models(V, N, lora.config) | {
        "lora_embedding_A frozen": frozen,
        "two adapters": tuner.layer(nn.Embedding(V, N), lora.config(), lora.config(r=7, lora_alpha=3)),
    }


LORA = register(
    Method(
        name="LoRA of embeddings",
        of="LoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.lora.layer.Embedding",
        adapters="lora_embedding_A",
        base=base,
        held=held,
        apply=apply,
        examples=examples,
        inputs=inputs,
        build=tuner.builder("LoraConfig"),
        op="embedding",
        saves="the ids, and (M, R)",
        merges="E + s (B A)^T",
        tested={"peft": ((0, 21), (0, 21))},
    )
)

"""VB-LoRA (Li et al. 2024) on a linear layer, as HF PEFT computes it: LoRA whose matrices are mixed of one bank's vectors.

    y = x W^T + B (A drop(x)) + bias
    piece [i, t] of A = sum over the top_k largest logits l_A[i, t] of softmax(those) times the vectors of the bank

A piece has the bank's V columns; the bank (H, V) trains for all layers together, logits (R, K / V, H) and (N / V, R, H) for
each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...bases.base import Base
from ...checks import check_whole
from ...ops.dropout_mask import acting
from .. import tuner
from ..linear import Branch, Linear, frozen_weight, run
from ..look import Look
from ..registry import Held, Method, register


def _mixed(logits: Tensor, bank: Tensor, top_k: int) -> Tensor:
    best, which = logits.topk(top_k, dim=-1)
    return (torch.softmax(best, -1).unsqueeze(-1) * bank[which]).sum(-2)


def _branch(
    tensors: tuple[Tensor, ...], top_k: int, dropout_p: float, seed: int | Tensor | None = None
) -> Branch:  # fmt: skip
    logits_A, logits_B, bank = tensors
    A = _mixed(logits_A, bank, top_k).flatten(1)
    B = _mixed(logits_B, bank, top_k).transpose(1, 2).flatten(0, 1)
    return Branch(A, B, 1.0, dropout_p, seed=seed)


def vblora_linear(
    x: Tensor, weight: Tensor | Base, vblora_logits_A: Tensor, vblora_logits_B: Tensor, vblora_vector_bank: Tensor, *,
    top_k: int = 2, bias: Tensor | None = None, dropout_p: float = 0.0, training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with VB-LoRA: the equation at the top of peftkern/methods/derived/vblora.py.

    Args:
        x: (..., K). weight: (N, K). vblora_logits_A: (R, K / V, H). vblora_logits_B: (N / V, R, H).
            vblora_vector_bank: (H, V). top_k: 1 to H. bias, dropout_p, training, seed: as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    weight = frozen_weight(
        weight, bias, vblora_vector_bank=(vblora_vector_bank, "H V"), vblora_logits_A=(vblora_logits_A, "R K/V H"),
        vblora_logits_B=(vblora_logits_B, "N/V R H"),
    )  # fmt: skip
    check_whole("top_k", top_k, 1, len(vblora_vector_bank))
    tensors = vblora_logits_A, vblora_logits_B, vblora_vector_bank
    return run(Linear(weight, bias).add(_branch(tensors, top_k, acting(dropout_p, training), seed)), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``vblora.Linear`` holds of an adapter."""
    l_A, l_B, bank = tuner.tensors(
        look,
        name,
        dict.fromkeys(("vblora_logits_A", "vblora_logits_B"), (None,) * 3) | {"vblora_vector_bank": (None, None)},
    )
    p = tuner.drop_probability(look, "vblora_dropout", name)
    numbers = look.item("topk", name), look.value("training")
    return Held(name, VBLORA, (l_A, l_B, bank), numbers, p, l_A.shape[0])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter. Raises RuntimeError in training where logits were left out of a checkpoint."""
    top_k, training = adapter.numbers
    # As the library does; a graph cannot ask.
    if training and not torch.compiler.is_compiling() and adapter.tensors[0][0, 0].isinf().any():
        raise RuntimeError(
            f"the logits of {adapter.name!r} are infinite: they come from a checkpoint with save_only_topk_weights, which "
            "cannot be trained further"
        )
    return y.add(_branch(adapter.tensors, top_k, adapter.dropout_p))


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft
    from transformers.pytorch_utils import Conv1D

    def config(**options):
        given = {"target_modules": ["0"], "num_vectors": 6, "vector_length": 4, "init_vector_bank_bound": 1.0}
        return peft.VBLoRAConfig(**{**given, "init_logits_std": 1.0, **options})

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(r=3, topk=3, vector_length=2)),
        "Conv1D": tuner.layer(Conv1D(N, K), config(fan_in_fan_out=True)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(r=2)),
    }


def build(linear: nn.Linear, rank: int) -> nn.Module:
    """A model of one layer around this one, with the longest vectors up to the default that fit."""
    import math

    length = math.gcd(256, *linear.weight.shape)
    return tuner.builder("VBLoRAConfig", num_vectors=90, vector_length=length)(linear, rank)


VBLORA = register(
    Method(
        name="VB-LoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.vblora.layer.Linear",
        adapters="vblora_logits_A",
        held=held,
        apply=apply,
        function=vblora_linear,
        examples=examples,
        build=build,
        rank=4,
        op="lora_linear",
        saves="x, (M, R) in fp32, and what A and B are mixed of",
        merges="W + B A",
        peft_type="VBLORA",
        keeps_dtype=True,
        makes=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

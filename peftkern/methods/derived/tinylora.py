"""TinyLoRA on a linear layer, as HF PEFT computes it: frozen factors of W, and a small matrix between them that trains.

    y = x W^T + B (R (A drop(x))) + bias,    R = sum_i v_i P_i

A (R, K) and B (N, R) are the leading singular vectors, times the roots of the singular values; P_i are random and fixed;
v, a few numbers, trains, and layers may share it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...bases.base import Base
from ...ops.dropout_mask import acting
from .. import tuner
from ..linear import Branch, Linear, frozen_weight, run
from ..look import PLAIN_TENSORS, Look, NotCovered
from ..registry import Held, Method, register


def _branch(A: Tensor, B: Tensor, P: Tensor, v: Tensor, dropout_p: float, seed: int | Tensor | None = None) -> Branch:
    mixed = torch.einsum("i,ijk->jk", v, P.to(v.dtype))
    return Branch(A, (B.to(v.dtype) @ mixed).to(A.dtype), 1.0, dropout_p, seed=seed)


def tinylora_linear(
    x: Tensor, weight: Tensor | Base, tinylora_A: Tensor, tinylora_B: Tensor, tinylora_P: Tensor, tinylora_v: Tensor, *,
    bias: Tensor | None = None, dropout_p: float = 0.0, training: bool = False, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with TinyLoRA: the equation at the top of peftkern/methods/derived/tinylora.py.

    Args:
        x: (..., K). weight: (N, K). tinylora_A: (R, K). tinylora_B: (N, R). tinylora_P: (U, R, R). tinylora_v: (U).
            bias, dropout_p, training, seed: as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    weight = frozen_weight(
        weight, bias, tinylora_A=(tinylora_A, "R K"), tinylora_B=(tinylora_B, "N R"),
        tinylora_P=(tinylora_P, "U R R"), tinylora_v=(tinylora_v, "U"),
    )  # fmt: skip
    branch = _branch(tinylora_A, tinylora_B, tinylora_P, tinylora_v, acting(dropout_p, training), seed)
    return run(Linear(weight, bias).add(branch), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``tinylora.Linear`` holds of an adapter, and the numbers that it shares with others."""
    A, B, P = tuner.tensors(
        look, name, {"tinylora_A": (None, shape[1]), "tinylora_B": (shape[0], None), "tinylora_P": None}
    )
    shared, key = look.part("tinylora_v").part(name), look.item("_tinylora_v_key", name)
    v = shared.tensor(key) if shared is not None and shared.holds(key) else None
    if type(v) not in PLAIN_TENSORS:
        raise NotCovered(f"tinylora_v of {name!r} is no plain tensor")
    return Held(
        name, TINYLORA, (A, B, P, v), dropout_p=tuner.drop_probability(look, "tinylora_dropout", name), rank=A.shape[0]
    )


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return y.add(_branch(*adapter.tensors, adapter.dropout_p))


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(**options):
        return peft.TinyLoraConfig(**{"target_modules": ["0"], "r": 3, "u": 7, "init_v_bound": 1.0, **options})

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(r=5)),
    }


TINYLORA = register(
    Method(
        name="TinyLoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.tinylora.layer.Linear",
        adapters="tinylora_A",
        held=held,
        apply=apply,
        function=tinylora_linear,
        examples=examples,
        build=tuner.builder("TinyLoraConfig"),
        rank=2,
        op="lora_linear",
        saves="(M, R) in fp32",
        merges="W + B R A",
        peft_type="TINYLORA",
        keeps_dtype=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

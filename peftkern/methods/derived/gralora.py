"""GraLoRA on a linear layer, as HF PEFT computes it: a LoRA for each of k blocks of x and k blocks of y.

    y[j] = (x W^T)[j] + s * sum over i of B[j][i] (A[i][j] drop(x)[i]) + bias[j]

A (k, K / k, R) has R ranks for each block i of x, B (k, R, N / k) as many for each block j of y; the ranks of either are
shared out evenly over the blocks of the other. So lora_A is block diagonal, and lora_B with its columns in another order;
their rank is k R. A LoRA of the whole layer, with a dropout of its own, may stand beside.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...bases.base import Base
from ...ops.dropout_mask import acting
from .. import tuner
from ..linear import Branch, Linear, frozen_weight, run
from ..look import Look, NotCovered
from ..registry import Held, Method, register

# k R (N + K) / (N K) beyond which the zeros between the blocks cost more than what is saved.
_CROSSOVER = 0.25


def _factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    k = A.shape[0]
    up = torch.block_diag(*B.transpose(1, 2))  # (N, k R), a column for each (j, i, rank)
    return torch.block_diag(*A.transpose(1, 2)), up.view(-1, k, k, B.shape[1] // k).transpose(1, 2).flatten(1)


def gralora_linear(
    x: Tensor, weight: Tensor | Base, gralora_A: Tensor, gralora_B: Tensor, *, bias: Tensor | None = None,
    scaling: float | Tensor = 1.0, dropout_p: float = 0.0, training: bool = False, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with GraLoRA: the equation at the top of peftkern/methods/derived/gralora.py.

    Args:
        x: (..., K). weight: (N, K). gralora_A: (k, K / k, R). gralora_B: (k, R, N / k), R a multiple of k. bias, scaling,
            dropout_p, training, seed: as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    weight = frozen_weight(weight, bias, gralora_A=(gralora_A, "k K/k R"), gralora_B=(gralora_B, "k R N/k"))
    branch = Branch(*_factors(gralora_A, gralora_B), scaling, acting(dropout_p, training), seed=seed)
    return run(Linear(weight, bias).add(branch), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``gralora.Linear`` holds of an adapter: its blocks, and lora_A and lora_B of a LoRA beside them."""
    (N, K), k, hybrid = shape, look.item("gralora_k", name), look.item("hybrid_r", name)
    A, B = tuner.tensors(look, name, {"gralora_A": (k, K // k, None), "gralora_B": (k, None, N // k)})
    rank = k * A.shape[2]
    if rank * (N + K) > _CROSSOVER * N * K and k > 2:
        raise NotCovered(f"the branch of {name!r} has rank {rank}, too much for a weight of {N} x {K}")
    beside = []
    for held_by in ("gralora_A_general", "gralora_B_general") if hybrid else ():
        part = look.part(held_by).part(name)
        part.require(nn.Linear, held_by)
        beside.append(part.tensor("weight"))
    if any(not tuner.plain_or_none(t) or t.dtype != A.dtype for t in beside):
        raise NotCovered(f"the tensors of {name!r} differ in dtype, or are not plain")
    scaling, p = tuner.number(look.item("scaling", name), name), tuner.drop_probability(look, "gralora_dropout", name)
    return Held(name, GRALORA, (A, B, *beside), (scaling,), p, rank + hybrid)


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    (A, B, *beside), (scaling,) = adapter.tensors, adapter.numbers
    y = y.add(Branch(*_factors(A, B), scaling, adapter.dropout_p))
    return y.add(Branch(*beside, scaling, adapter.dropout_p)) if beside else y


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft
    from transformers.pytorch_utils import Conv1D

    def config(**options):
        return peft.GraloraConfig(
            **{"target_modules": ["0"], "r": 4, "alpha": 6, "gralora_k": 2, "init_weights": False, **options}
        )

    K, N = in_features, out_features
    return {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(r=6)),
        "hybrid": tuner.layer(nn.Linear(K, N), config(hybrid_r=3)),
        "Conv1D": tuner.layer(Conv1D(N, K), config(fan_in_fan_out=True)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(r=2, alpha=3)),
    }


GRALORA = register(
    Method(
        name="GraLoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.gralora.layer.Linear",
        adapters="gralora_A",
        held=held,
        apply=apply,
        function=gralora_linear,
        examples=examples,
        build=tuner.builder("GraloraConfig"),
        rank=32,
        op="lora_linear",
        saves="x, (M, k R) in fp32, and lora_A and lora_B",
        merges="W + s B A",
        peft_type="GRALORA",
        keeps_dtype=True,
        makes=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

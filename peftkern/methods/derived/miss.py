"""MiSS on a linear layer, as HF PEFT computes it, its default and its ``mini`` form: LoRA whose A sums every R-th column.

    y = x W^T + B (A drop(x)) + bias,    A[i, k] = 1 where k mod R = i, else 0

``miss_block`` (R, N) is B^T; in the ``mini`` form it is repeated along N. The form ``bat`` rebuilds W, and is not covered.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...ops.dropout_mask import acting
from .. import tuner
from ..linear import Branch, Linear, run
from ..look import Look, NotCovered
from ..registry import Held, Method, register


def _branch(K: int, N: int, block: Tensor, dropout_p: float, seed: int | Tensor | None = None) -> Branch:
    R, columns = block.shape
    A = torch.eye(R, dtype=block.dtype, device=block.device).repeat(1, -(-K // R))[:, :K]
    return Branch(A, block.repeat(1, N // columns).t(), 1.0, dropout_p, seed=seed)


def miss_linear(
    x: Tensor, weight: Tensor, miss_block: Tensor, *, bias: Tensor | None = None, dropout_p: float = 0.0,
    training: bool = False, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with MiSS: the equation at the top of peftkern/methods/derived/miss.py.

    Args:
        x: (..., K). weight: (N, K). miss_block: (R, N), or (R, n) with N a multiple of n. bias, dropout_p, training,
            seed: as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    N, K = weight.shape
    return run(Linear(weight, bias).add(_branch(K, N, miss_block, acting(dropout_p, training), seed)), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``miss.MissLinear`` holds of an adapter."""
    if look.value("miss_fn") == "bat":
        raise NotCovered("MiSS in its form bat is not covered: it rebuilds the weight")
    (block,) = tuner.tensors(look, name, {"miss_block": (None, None)})
    if shape[0] % block.shape[1]:
        raise NotCovered(f"miss_block of {name!r} has shape {tuple(block.shape)}")
    p = tuner.drop_probability(look, "miss_dropout", name)
    return Held(name, MISS, (block,), dropout_p=p, rank=block.shape[0])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    N, K = y.weight.shape
    return y.add(_branch(K, N, *adapter.tensors, adapter.dropout_p))


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(**options):
        return peft.MissConfig(**{"target_modules": ["0"], "r": 4, "init_weights": False, **options})

    K, N = in_features, out_features
    models = {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(r=5)),
        "mini": tuner.layer(nn.Linear(K, N), config(init_weights="mini", mini_r=N // 2)),
    }
    torch.nn.init.normal_(models["mini"].base_model.model[0].miss_block["default"])
    return models


MISS = register(
    Method(
        name="MiSS",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.miss.layer.MissLinear",
        adapters="miss_block",
        held=held,
        apply=apply,
        function=miss_linear,
        examples=examples,
        build=tuner.builder("MissConfig"),
        op="lora_linear",
        saves="(M, R) in fp32",
        merges="W + B A",
        peft_type="MISS",
        keeps_dtype=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

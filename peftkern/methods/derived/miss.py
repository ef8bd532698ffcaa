"""MiSS on a linear layer, as HF PEFT computes it, its default and its ``mini`` form: LoRA whose A sums every R-th column.

    y = x W^T + B (A drop(x)) + bias,    A[i, k] = 1 where k mod R = i, else 0

``miss_block`` (R, N) is B^T; in the ``mini`` form it is repeated along N. The form ``bat`` folds the weight: the blocks w (R, R)
of R rows of it all meet the block b of those rows, one of ``miss_block`` (N / R, R, R), and nothing is dropped.

    y = x W'^T + bias,    each block w' = w + w b + b
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...autograd.shapes import uncast
from ...bases.base import Base
from ...ops.dropout_mask import acting
from .. import tuner
from ..exact import refuse_half, wide
from ..linear import Branch, Linear, frozen_weight, run
from ..look import Look, NotCovered
from ..registry import Held, Method, register


def _branch(K: int, N: int, block: Tensor, dropout_p: float, seed: int | Tensor | None = None) -> Branch:
    R, columns = block.shape
    A = torch.eye(R, dtype=block.dtype, device=block.device).repeat(1, -(-K // R))[:, :K]
    return Branch(A, block.repeat(1, N // columns).t(), 1.0, dropout_p, seed=seed)


def _bat(y: Linear, block: Tensor) -> Linear:
    W, (rows, R, _) = y.whole_weight(), block.shape
    b = wide(block)
    with uncast(W):
        change = torch.bmm(wide(W).reshape(rows, -1, R), b).view(rows, R, -1, R) + b[:, :, None]
    return y.fold(change.view(W.shape))


def miss_linear(
    x: Tensor, weight: Tensor | Base, miss_block: Tensor, *, bias: Tensor | None = None, dropout_p: float = 0.0,
    training: bool = False, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with MiSS: the equation at the top of peftkern/methods/derived/miss.py.

    Args:
        x: (..., K). weight: (N, K). miss_block: (R, N), or (R, n) with N a multiple of n, or (N / R, R, R) with K a multiple
            of R too. bias, dropout_p, training, seed: as in ``lora_linear``; they drop nothing in the last form.

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    weight = frozen_weight(weight, bias, miss_block=(miss_block, "R n|N/R R R"))
    size, whole = miss_block.shape[-1], weight.shape[miss_block.dim() - 2]
    if not miss_block.numel() or whole % size:
        raise ValueError(f"miss_block has shape {tuple(miss_block.shape)}, but {size} is no divisor of {whole}")
    return run(_with(Linear(weight, bias), miss_block, acting(dropout_p, training), seed), x)


def _with(y: Linear, block: Tensor, dropout_p: float, seed: int | Tensor | None = None) -> Linear:
    N, K = y.weight.shape
    return _bat(y, block) if block.dim() == 3 else y.add(_branch(K, N, block, dropout_p, seed))


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``miss.MissLinear`` holds of an adapter."""
    if look.value("miss_fn") == "bat":
        (block,) = tuner.tensors(look, name, {"miss_block": (None, None, None)})
        refuse_half(name, block)
        if block.shape != (shape[0] // block.shape[2], block.shape[2], block.shape[2]):
            raise NotCovered(f"miss_block of {name!r} has shape {tuple(block.shape)}")
        return Held(name, MISS, (block,), folds=True)
    (block,) = tuner.tensors(look, name, {"miss_block": (None, None)})
    if shape[0] % block.shape[1]:
        raise NotCovered(f"miss_block of {name!r} has shape {tuple(block.shape)}")
    p = tuner.drop_probability(look, "miss_dropout", name)
    return Held(name, MISS, (block,), dropout_p=p, rank=block.shape[0])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return _with(y, *adapter.tensors, adapter.dropout_p)


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
    r = math.gcd(K, N)
    models["bat"] = tuner.layer(nn.Linear(K, N), config(r=r, init_weights="bat"))
    models["bat, two adapters"] = tuner.layer(nn.Linear(K, N), *[config(r=r, init_weights="bat")] * 2)
    for case in ("mini", "bat", "bat, two adapters"):
        for block in models[case].base_model.model[0].miss_block.values():
            torch.nn.init.normal_(block)
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
        saves="(M, R) in fp32; in its form bat x, and the folded weight in fp32",
        merges="W + B A; in its form bat W'",
        peft_type="MISS",
        keeps_dtype=True,
        loses_small=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

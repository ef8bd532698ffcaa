"""VeRA (Kopiczko et al. 2023) on a linear layer, as HF PEFT computes it.

    y = x W^T + b * (B (d * (A drop(x)))) + bias

A and B are random, frozen, shared by all layers and made for the largest of them: a layer takes the first K columns of A
and the first N rows of B. The vectors d (R) and b (N) train.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...ops.dropout_mask import acting
from .. import tuner
from ..linear import Branch, Linear, run
from ..look import Look
from ..registry import Held, Method, register


def with_vera(y: Linear, tensors: tuple[Tensor, ...], dropout_p: float, seed: int | Tensor | None = None) -> Linear:
    """The layer with vera_A, vera_B, lambda_d and lambda_b."""
    (N, K), (A, B, d, b) = y.weight.shape, tensors
    return y.add(Branch(A[:, :K], B[:N], 1.0, dropout_p, d=d, g_d=b, seed=seed))


def vera_linear(
    x: Tensor, weight: Tensor, vera_A: Tensor, vera_B: Tensor, vera_lambda_d: Tensor, vera_lambda_b: Tensor, *,
    bias: Tensor | None = None, dropout_p: float = 0.0, training: bool = False, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with VeRA: the equation at the top of peftkern/methods/vera.py.

    Args:
        x: (..., K). weight: (N, K). vera_A: (R, at least K). vera_B: (at least N, R). vera_lambda_d: (R).
        vera_lambda_b: (N). bias, dropout_p, training, seed: as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does. x is not saved for backward unless vera_A requires grad.
    """
    tensors = vera_A, vera_B, vera_lambda_d, vera_lambda_b
    return run(with_vera(Linear(weight, bias), tensors, acting(dropout_p, training), seed), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``vera.Linear`` holds of an adapter."""
    d, b, A, B = tuner.tensors(
        look, name, {"vera_lambda_d": None, "vera_lambda_b": shape[:1], "vera_A": None, "vera_B": None}
    )
    p = tuner.drop_probability(look, "vera_dropout", name)
    return Held(name, VERA, (A, B, d, b), dropout_p=p, rank=d.numel())


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return with_vera(y, adapter.tensors, adapter.dropout_p)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft
    from transformers.pytorch_utils import Conv1D

    def config(**options):
        return peft.VeraConfig(**{"target_modules": ["0"], "r": 9, "init_weights": False, **options})

    K, N = in_features, out_features
    models = {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(r=40)),
        "Conv1D": tuner.layer(Conv1D(N, K), config(fan_in_fan_out=True)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(d_initial=0.3)),
    }
    for model in models.values():
        for name, p in model.named_parameters():
            if "lambda" in name:
                torch.nn.init.normal_(p)
    return models


VERA = register(
    Method(
        name="VeRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.vera.layer.Linear",
        adapters="vera_lambda_d",
        held=held,
        apply=apply,
        function=vera_linear,
        examples=examples,
        build=tuner.builder("VeraConfig"),
        rank=256,
        op="lora_linear",
        coefficients=("d", "g_d"),
        saves="(M, R) in fp32",
        merges="W + diag(b) B diag(d) A",
        peft_type="VERA",
        keeps_dtype=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

"""VeRA (Kopiczko et al. 2023) on a linear layer, as HF PEFT computes it.

    y = x W^T + b * (B (d * (A drop(x)))) + bias

A and B are random, frozen, shared by all layers and made for the largest of them: a layer takes the first K columns of A
and the first N rows of B. The vectors d (R) and b (N) train.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...bases.base import Base
from ...ops.dropout_mask import acting
from .. import tuner
from ..linear import Branch, Linear, frozen_weight, run
from ..look import Look
from ..registry import Held, Method, register
from ..stored import Settings, Size, Stored, Unfit, check_rank


def with_vera(y: Linear, tensors: tuple[Tensor, ...], dropout_p: float, seed: int | Tensor | None = None) -> Linear:
    """The layer with vera_A, vera_B, lambda_d and lambda_b."""
    (N, K), (A, B, d, b) = y.weight.shape, tensors
    return y.add(Branch(A[:, :K], B[:N], 1.0, dropout_p, d=d, g_d=b, seed=seed))


def vera_linear(
    x: Tensor, weight: Tensor | Base, vera_A: Tensor, vera_B: Tensor, vera_lambda_d: Tensor, vera_lambda_b: Tensor, *,
    bias: Tensor | None = None, dropout_p: float = 0.0, training: bool = False, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with VeRA: the equation at the top of peftkern/methods/vera.py.

    Args:
        x: (..., K). weight: (N, K). vera_A: (R, at least K). vera_B: (at least N, R). vera_lambda_d: (R).
        vera_lambda_b: (N). bias, dropout_p, training, seed: as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does. x is not saved for backward unless vera_A requires grad.
    """
    weight = frozen_weight(
        weight, bias, vera_A=(vera_A, "R K+"), vera_B=(vera_B, "N+ R"), vera_lambda_d=(vera_lambda_d, "R"),
        vera_lambda_b=(vera_lambda_b, "N"),
    )  # fmt: skip
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


def _check(settings: Settings) -> None:
    check_rank(settings, "r")
    key = settings["projection_prng_key"]
    if isinstance(key, bool) or not isinstance(key, int):
        raise Unfit("projection_prng_key", f"is {key!r}, expected a whole number")


def _made(settings: Settings, layers: Sequence[Size]) -> dict[str, Tensor]:
    """vera_A and vera_B where a checkpoint leaves them to their key: uniform, as PEFT draws them for the largest layer."""
    R, g = settings["r"], torch.Generator().manual_seed(settings["projection_prng_key"])
    made = {}
    for name, shape in (
        ("vera_A", (R, max(layer.in_features for layer in layers))),
        ("vera_B", (max(layer.out_features for layer in layers), R)),
    ):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        t = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=g)
        for layer in layers:  # each layer has rounded them to its own weight's dtype
            t = t.to(layer.dtype)
        made[name] = t
    return made


def _take(settings: Settings, module: str, tensors: Mapping[str, Tensor]) -> tuple[tuple, tuple]:
    return tuple(tensors[name] for name in ("vera_A", "vera_B", "vera_lambda_d", "vera_lambda_b")), ()


STORED = Stored(
    names=("vera_lambda_d", "vera_lambda_b"),
    shapes=lambda settings, module: {"vera_lambda_d": "R", "vera_lambda_b": "N"},
    take=_take,
    rank=lambda settings, module: settings["r"],
    reads={"r": 256, "projection_prng_key": 0, "save_projection": True},
    check=_check,
    ignores={"d_initial", "init_weights", "vera_dropout"},
    shared={"vera_A": "RK", "vera_B": "NR"},
    saves_shared=lambda settings: bool(settings["save_projection"]),
    made=_made,
)


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
        stored=STORED,
        keeps_dtype=True,
        loses_small=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

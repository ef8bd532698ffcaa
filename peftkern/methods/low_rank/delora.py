"""DeLoRA (Bini et al. 2025) on a linear layer, as HF PEFT computes it.

    y = x W^T + B (d * (A (drop(x) * w))) + bias,    d[i] = (lambda / R) / (|A_i| |B^i|), both norms at least 1e-4

A_i are the rows of A, B^i the columns of B; w (K) are the norms of W's columns, fixed when the adapter was made; lambda, a
number that trains, bounds how far the weights move.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...bases.base import Base
from ...ops.dropout_mask import acting
from .. import tuner
from ..linear import Branch, Linear, frozen_weight, run
from ..look import Look
from ..registry import Held, Method, register
from ..stored import Settings, Stored, check_patterns, check_rank, of_module


def _branch(
    A: Tensor, B: Tensor, strength: Tensor, w: Tensor, dropout_p: float, seed: int | Tensor | None = None
) -> Branch:
    norms = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)
    return Branch(A, B, 1.0, dropout_p, d=strength / A.shape[0] / norms, p_d=w, seed=seed)


def delora_linear(
    x: Tensor, weight: Tensor | Base, delora_A: Tensor, delora_B: Tensor, delora_lambda: Tensor, delora_w_norm: Tensor, *,
    bias: Tensor | None = None, dropout_p: float = 0.0, training: bool = False, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with DeLoRA: the equation at the top of peftkern/methods/delora.py.

    Args:
        x: (..., K). weight: (N, K). delora_A: (R, K). delora_B: (N, R). delora_lambda: one element. delora_w_norm: (K).
            bias, dropout_p, training, seed: as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    weight = frozen_weight(
        weight, bias, delora_A=(delora_A, "R K"), delora_B=(delora_B, "N R"), delora_lambda=(delora_lambda, "1|"),
        delora_w_norm=(delora_w_norm, "K"),
    )  # fmt: skip
    branch = _branch(delora_A, delora_B, delora_lambda, delora_w_norm, acting(dropout_p, training), seed)
    return run(Linear(weight, bias).add(branch), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``delora.DeloraLinear`` holds of an adapter."""
    shapes = {"delora_A": (None, shape[1]), "delora_B": (shape[0], None), "delora_lambda": (1,)}
    A, B, strength = tuner.tensors(look, name, shapes)
    (w,) = tuner.tensors(look, name, {"delora_w_norm": shape[1:]})
    p = tuner.drop_probability(look, "delora_dropout", name)
    return Held(name, DELORA, (A, B, strength, w), dropout_p=p, rank=A.shape[0])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    return y.add(_branch(*adapter.tensors, adapter.dropout_p))


def _check(settings: Settings) -> None:
    check_rank(settings, "r")
    check_patterns(settings, "rank_pattern", ranks=True)


_SHAPES = {"delora_A": "RK", "delora_B": "NR", "delora_lambda": "1", "delora_w_norm": "K"}
STORED = Stored(
    names=tuple(_SHAPES),
    shapes=lambda settings, module: _SHAPES,
    take=lambda settings, module, tensors: (tuple(tensors[name] for name in _SHAPES), ()),
    rank=lambda settings, module: of_module(settings["rank_pattern"], module, settings["r"]),
    reads={"r": 8, "rank_pattern": None},
    check=_check,
    ignores={"delora_lambda", "init_weights", "lambda_pattern", "module_dropout"},  # lambda is a tensor of the file
)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft

    def config(**options):
        return peft.DeloraConfig(
            **{"target_modules": ["0"], "r": 6, "delora_lambda": 7, "init_weights": False, **options}
        )

    K, N = in_features, out_features
    models = {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(r=30)),
        "two adapters": tuner.layer(nn.Linear(K, N), config(), config(r=3)),
    }
    for model in models.values():
        for w in model.base_model.model[0].delora_w_norm.values():
            torch.nn.init.uniform_(w, 0.5, 2.0)
    return models


DELORA = register(
    Method(
        name="DeLoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.delora.layer.DeloraLinear",
        adapters="delora_A",
        held=held,
        apply=apply,
        function=delora_linear,
        examples=examples,
        build=tuner.builder("DeloraConfig"),
        op="lora_linear",
        coefficients=("d", "p_d"),
        saves="x if delora_A trains, and (M, R) in fp32",
        merges="W + B diag(d) A diag(w)",
        peft_type="DELORA",
        stored=STORED,
        keeps_dtype=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

"""AdaLoRA (Zhang et al. 2023) on a linear layer, as HF PEFT computes it.

    y = x W^T + (alpha / (n + 1e-5)) * B (E * (A drop(x))) + bias

E (R) are the singular values, some of them zero once the budget is spent. n is the rank at the start, a tensor, which the
host never reads.
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


def adalora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor, *, bias: Tensor | None = None,
    scaling: float | Tensor = 1.0, dropout_p: float = 0.0, training: bool = False, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with AdaLoRA: the equation at the top of peftkern/methods/adalora.py.

    Args:
        x: (..., K). weight: (N, K). lora_A: (R, K). lora_B: (N, R). lora_E: (R) or (R, 1). scaling: the whole factor,
            which HF PEFT computes as alpha / (ranknum + 1e-5). bias, dropout_p, training, seed: as in ``lora_linear``.

    Returns (..., N). Raises as ``lora_linear`` does.
    """
    p = acting(dropout_p, training)
    return run(Linear(weight, bias).add(Branch(lora_A, lora_B, scaling, p, d=lora_E.flatten(), seed=seed)), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``adalora.SVDLinear`` holds of an adapter."""
    A, B, E = tuner.tensors(look, name, {"lora_A": (None, shape[1]), "lora_B": (shape[0], None), "lora_E": (None, 1)})
    (n,) = tuner.tensors(look, name, {"ranknum": (1,)})
    scaling = tuner.number(look.item("scaling", name), name)
    p = tuner.drop_probability(look, "lora_dropout", name)
    return Held(name, ADALORA, (A, B, E, n), (scaling,), p, A.shape[0])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    (A, B, E, n), (alpha,) = adapter.tensors, adapter.numbers
    return y.add(Branch(A, B, alpha / (n + 1e-5), adapter.dropout_p, d=E.flatten()))


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    import peft
    from transformers.pytorch_utils import Conv1D

    def config(**options):
        return peft.AdaLoraConfig(
            **{"target_modules": ["0"], "init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 5, **options}
        )

    K, N = in_features, out_features
    models = {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(init_r=30)),
        "Conv1D": tuner.layer(Conv1D(N, K), config(fan_in_fan_out=True)),
        "pruned": tuner.layer(nn.Linear(K, N), config()),
    }
    for model in models.values():
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p)
    models["pruned"].base_model.model[0].lora_E["default"].data[2:] = 0.0
    return models


ADALORA = register(
    Method(
        name="AdaLoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.adalora.layer.SVDLinear",
        adapters="lora_A",
        held=held,
        apply=apply,
        function=adalora_linear,
        examples=examples,
        build=tuner.builder("AdaLoraConfig", "init_r", target_r=1, total_step=10),
        op="lora_linear",
        coefficients=("d",),
        nests=True,
        saves="x if lora_A trains, and (M, R) in fp32",
        merges="W + s B diag(E) A",
        peft_type="ADALORA",
        tested={"peft": ((0, 21), (0, 21))},
    )
)

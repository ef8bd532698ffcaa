"""PVeRA on a linear layer, as HF PEFT computes it without sampling: VeRA of the means.

    y = x W^T + b * (B (d_m * (A_m x))) + bias

The upper half of A and d makes means, the lower half logarithms of variances, which only sampling reads: in training, and
with ``sample_at_inference``. Then the library's own code runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .. import tuner
from ..linear import Branch, Linear
from ..look import Look, NotCovered
from ..registry import Held, Method, register


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``pvera.Linear`` holds of an adapter."""
    if look.value("training") or look.item("sample_at_inference", name):
        raise NotCovered("PVeRA draws a sample")
    names = ("pvera_lambda_d", "pvera_lambda_b", "pvera_A", "pvera_B")
    d, b, A, B = tuner.tensors(look, name, dict.fromkeys(names))
    return Held(name, PVERA, (d, b, A, B), rank=B.shape[1])


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    (N, K), (d, b, A, B) = y.weight.shape, adapter.tensors
    half = B.shape[1]
    return y.add(Branch(A[:half, :K], B[:N], d=d[:half], g_d=b))


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer, in evaluation."""
    import peft

    def config(**options):
        return peft.PveraConfig(**{"target_modules": ["0"], "r": 8, "init_weights": False, **options})

    K, N = in_features, out_features
    models = {
        "linear": tuner.layer(nn.Linear(K, N), config()),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(r=20)),
    }
    for model in models.values():
        for name, p in model.named_parameters():
            if "lambda" in name:
                torch.nn.init.normal_(p)
    return models


PVERA = register(
    Method(
        name="PVeRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.pvera.layer.Linear",
        adapters="pvera_lambda_d",
        held=held,
        apply=apply,
        examples=examples,
        build=tuner.builder("PveraConfig"),
        rank=256,
        trains=False,
        op="lora_linear",
        coefficients=("d", "g_d"),
        saves="(M, R) in fp32",
        merges="W + diag(b) B diag(d) A",
        peft_type="PVERA",
        keeps_dtype=True,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

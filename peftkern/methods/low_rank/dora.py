"""DoRA (Liu et al. 2024) on a linear layer, as HF PEFT computes it.

    y = f * (x W^T + s B (A x)) + bias,        f = m / n,  n[o] = |W + s B A| of row o, taken as a constant

In training with dropout HF PEFT's DoRA is another function, with two base products: the one of the input as it is and,
scaled, the one of what is left of it:

    y = x W^T + (f - 1) * (drop(x) W^T) + s f * B (A drop(x)) + bias

A layer that has several adapters applies them in turn, each to what the ones before it made.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...autograd.row_norm import row_norm
from ...bases.base import Base
from ...checks import accumulate_dtype
from ...ops.dropout_mask import acting
from .. import lora_stored, tuner
from ..linear import Branch, Linear, frozen_weight, run
from ..look import PLAIN_TENSORS, Look, NotCovered
from ..registry import Held, Method, register
from . import lora


def with_dora(y: Linear, branch: Branch, magnitude: Tensor) -> Linear:
    """The layer with a branch whose magnitudes (N) are these."""
    A, B, s = branch.lora_A, branch.lora_B, branch.scaling
    f = magnitude.to(accumulate_dtype(magnitude.dtype)) / row_norm(y.weight, A, B, s)
    branch = branch._replace(g_d=f)
    return y.scaled(f).add(branch) if branch.dropout_p == 0.0 else y.add(branch._replace(share=f - 1.0))


def dora_linear(
    x: Tensor, weight: Tensor | Base, lora_A: Tensor, lora_B: Tensor, lora_magnitude_vector: Tensor, *,
    bias: Tensor | None = None, scaling: float | Tensor = 1.0, dropout_p: float = 0.0, training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A frozen linear layer with DoRA: the equation at the top of peftkern/methods/dora.py.

    Args:
        x: (..., K). weight: (N, K). lora_A: (R, K). lora_B: (N, R). bias, scaling, dropout_p, training, seed: as in
            ``lora_linear``.
        lora_magnitude_vector: m (N), in fp32 or x's dtype.

    Returns (..., N). Differentiable as ``lora_linear`` is, and in the magnitudes; the norm gets no gradient. Raises as
    ``lora_linear`` does.
    """
    weight = frozen_weight(
        weight, bias, lora_A=(lora_A, "R K"), lora_B=(lora_B, "N R"), lora_magnitude_vector=(lora_magnitude_vector, "N")
    )
    branch = Branch(lora_A, lora_B, scaling, acting(dropout_p, training), seed=seed)
    return run(with_dora(Linear(weight, bias), branch, lora_magnitude_vector), x)


def held(look: Look, name: str, shape: tuple[int, int]) -> Held:
    """What ``lora.Linear`` holds of a DoRA adapter: LoRA's tensors, and the magnitudes."""
    adapter = lora.read(look, name, shape, DORA)
    if adapter.tensors[2] is not None:
        raise NotCovered(f"lora_B of {name!r} has a bias, which DoRA does not know")
    part = look.part("lora_magnitude_vector").part(name)
    magnitude = None if part is None else part.tensor("weight")
    if type(magnitude) not in PLAIN_TENSORS or magnitude.shape != shape[:1]:
        raise NotCovered(f"the magnitudes of {name!r} are no plain tensor of {shape[0]} elements")
    return adapter._replace(tensors=(*adapter.tensors, magnitude))


def apply(y: Linear, adapter: Held) -> Linear:
    """The layer with this adapter."""
    (A, B, _, magnitude), (scaling,) = adapter.tensors, adapter.numbers
    return with_dora(y, Branch(A, B, scaling, adapter.dropout_p), magnitude)


def examples(in_features: int, out_features: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    from transformers.pytorch_utils import Conv1D

    K, N, config = in_features, out_features, lora.config
    models = {
        "linear": tuner.layer(nn.Linear(K, N), config(use_dora=True)),
        "no bias": tuner.layer(nn.Linear(K, N, bias=False), config(use_dora=True, use_rslora=True)),
        "Conv1D": tuner.layer(Conv1D(N, K), config(use_dora=True, fan_in_fan_out=True)),
        "after LoRA": tuner.layer(nn.Linear(K, N), config(), config(use_dora=True, r=7)),
        "twice": tuner.layer(nn.Linear(K, N), config(use_dora=True), config(use_dora=True, lora_alpha=3)),
    }
    for model in models.values():
        for magnitudes in model.base_model.model[0].lora_magnitude_vector.values():
            torch.nn.init.uniform_(magnitudes.weight, 0.5, 2.0)
    return models


DORA = register(
    Method(
        name="DoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.lora.variants.DoraLinearVariant",
        variant=True,
        held=held,
        apply=apply,
        function=dora_linear,
        examples=examples,
        build=tuner.builder("LoraConfig", use_dora=True),
        op="lora_linear",
        coefficients=("g_b", "g_d"),
        saves="as LoRA, and x W^T (M, N) if the magnitudes train",
        merges="f * (W + s B A)",
        peft_type="LORA",
        stored=lora_stored.DORA,
        tested={"peft": ((0, 21), (0, 21))},
    )
)

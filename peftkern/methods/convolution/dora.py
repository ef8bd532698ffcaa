"""DoRA on a convolution: y = f * (conv(x, W) + s conv_1x1(conv(x, A), B)) + bias,   f = m / n

n[o] is the norm of all of W + s BA that makes output o, taken as a constant. In training with dropout, as for linear layers:

    y = conv(x - drop(x), W) + bias + f * (conv(drop(x), W) + s conv_1x1(conv(drop(x), A), B))
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...autograd.row_norm import row_norm
from ...checks import accumulate_dtype
from .. import tuner
from ..look import PLAIN_TENSORS, Look, NotCovered
from ..low_rank import lora
from ..registry import Held, Method, register
from .layer import Branch, Convolution
from .lora import inputs, models, read, scaled


def held(look: Look, name: str, shape: tuple[int, ...]) -> Held:
    """What the layer holds of a DoRA adapter: LoRA's tensors, and the magnitudes."""
    adapter = read(look, name, shape, DORA)
    if adapter.tensors[2] is not None:
        raise NotCovered(f"lora_B of {name!r} has a bias, which DoRA does not know")
    if (
        adapter.dropout_p > 0.0
        and adapter.tensors[0].dtype != look.part("base_layer").tensor("weight", frozen=True).dtype
    ):
        raise NotCovered(
            f"PEFT's DoRA convolves what is left of its input in the dtype of {name!r}, not the base layer's"
        )
    if not tuner.alone(look):
        raise NotCovered(f"adapter {name!r} is DoRA, and there are other active adapters")
    part = look.part("lora_magnitude_vector").part(name)
    magnitude = None if part is None else part.tensor("weight")
    if type(magnitude) not in PLAIN_TENSORS or magnitude.shape != (1, shape[0], *[1] * (len(shape) - 2)):
        raise NotCovered(f"the magnitudes of {name!r} are no plain tensor of {shape[0]} elements")
    return adapter._replace(tensors=(*adapter.tensors, magnitude))


def apply(y: Convolution, adapter: Held) -> Convolution:
    """The layer with this adapter."""
    (A, B, _, magnitude), (s,) = adapter.tensors, adapter.numbers
    m = magnitude.flatten()
    f = m.to(accumulate_dtype(m.dtype)) / row_norm(y.weight.flatten(1), A.flatten(1), B.flatten(1), s)
    return y.add(Branch(A, *scaled(B, s), adapter.dropout_p, f))


def examples(in_channels: int, out_channels: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    found = models(in_channels, out_channels, lambda **options: lora.config(use_dora=True, **options))
    frozen = models(in_channels, out_channels, lambda **options: lora.config(use_dora=True, **options))["Conv2d"]
    frozen.base_model.model[0].lora_magnitude_vector.requires_grad_(False)
    found["magnitudes frozen"] = frozen
    for model in found.values():
        for magnitudes in model.base_model.model[0].lora_magnitude_vector.values():
            torch.nn.init.uniform_(magnitudes.weight, 0.5, 2.0)
    return found


def batched(model: nn.Module, in_channels: int) -> list[Tensor]:
    """Inputs of these models, all with a batch: PEFT knows no others."""
    dims = model.base_model.model[0].weight.dim()
    return [x if x.dim() == dims else x[None] for x in inputs(model, in_channels)]


DORA = register(
    Method(
        name="DoRA of convolutions",
        of="DoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.lora.variants.DoraConv2dVariant",
        also=("peft.tuners.lora.variants.DoraConv1dVariant", "peft.tuners.lora.variants.DoraConv3dVariant"),
        variant=True,
        held=held,
        apply=apply,
        examples=examples,
        inputs=batched,
        build=tuner.builder("LoraConfig", use_dora=True),
        op="convolution",
        saves="as LoRA, and the output without bias and magnitudes if these train",
        merges="f * (W + s B A)",
        tested={"peft": ((0, 21), (0, 21))},
    )
)

"""LoRA on a convolution: y = conv(x, W) + bias + sum over adapters of s * (conv_1x1(conv(drop(x), A), B) + bias_B)

A has W's kernel, stride and padding and R outputs. Without dropout it is a convolution with W + s BA.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import tuner
from ..look import PLAIN_TENSORS, Look, NotCovered
from ..low_rank import lora
from ..registry import Held, Method, register
from .layer import CLASSES, Branch, Convolution, base


def held(look: Look, name: str, shape: tuple[int, ...]) -> Held:
    """What the layer holds of an adapter: LoRA, or DoRA."""
    method = lora.variant(look, name)
    return read(look, name, shape, LORA) if method is None else method.held(look, name, shape)


def read(look: Look, name: str, shape: tuple[int, ...], method: Method) -> Held:
    """lora_A, lora_B and its bias, the scaling and the dropout of an adapter."""
    down, up, cls = look.part("lora_A").part(name), look.part("lora_B").part(name), type(look.part("base_layer").module)
    if up is None:
        raise NotCovered(f"adapter {name!r} lacks a part")
    for part, of in ((down, "lora_A"), (up, "lora_B")):
        part.require(cls, of)
    p = tuner.drop_probability(look, "lora_dropout", name)
    A, B, bias = down.tensor("weight"), up.tensor("weight"), up.tensor("bias")
    if not all(type(t) in PLAIN_TENSORS for t in (A, B)) or not tuner.plain_or_none(bias):
        raise NotCovered(f"a weight of {name!r} is not a plain tensor")
    fit = A.shape[1:] == shape[1:] and B.shape == (shape[0], A.shape[0], *[1] * (len(shape) - 2))
    if not fit or down.tensor("bias") is not None or down.value("stride") != look.part("base_layer").value("stride"):
        raise NotCovered(f"the parts of {name!r} do not fit: lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)}")
    if len({t.dtype for t in (A, B, bias) if t is not None}) > 1:
        raise NotCovered(f"the tensors of {name!r} differ in dtype")
    scaling = tuner.number(look.item("scaling", name), name)
    if p > 0.0 and not tuner.alone(look):
        raise NotCovered(f"adapter {name!r} drops, and there are other active adapters")
    return Held(name, method, (A, B, bias), (scaling,), p, A.shape[0])


def scaled(lora_B: Tensor, scaling: float | Tensor) -> tuple[Tensor, float]:
    """lora_B and its scaling as a number: in it already, where it is a tensor."""
    return (lora_B * scaling, 1.0) if isinstance(scaling, Tensor) else (lora_B, float(scaling))


def apply(y: Convolution, adapter: Held) -> Convolution:
    """The layer with this adapter."""
    (A, B, bias), (s,) = adapter.tensors, adapter.numbers
    if bias is not None:
        y = y._replace(bias=bias * s if y.bias is None else y.bias + bias * s)
    return y.add(Branch(A, *scaled(B, s), adapter.dropout_p))


def models(in_channels: int, out_channels: int, config) -> dict[str, nn.Module]:
    """A model of one layer for each number of dimensions, and some of other shapes."""
    C, N = in_channels, out_channels
    return {
        "Conv2d": tuner.layer(nn.Conv2d(C, N, 3, padding=1), config()),
        "Conv1d": tuner.layer(nn.Conv1d(C, N, 3, stride=2, padding=2), config(use_rslora=True)),
        "Conv3d": tuner.layer(nn.Conv3d(C, N, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), config()),
        "1x1": tuner.layer(nn.Conv2d(C, N, 1), config(lora_alpha=2)),
        "patches": tuner.layer(nn.Conv2d(C, N, 2, stride=2, bias=False), config()),
        "whole": tuner.layer(nn.Conv1d(C, N, 4, padding=0), config(lora_alpha=3)),
    }


def inputs(model: nn.Module, in_channels: int) -> list[Tensor]:
    """Inputs of these models, small ones and large ones, without a batch, and an empty batch."""
    layer = next(m for m in model.modules() if type(m) in CLASSES)
    dims = layer.weight.dim() - 2
    shapes = [(2, in_channels, 5, 6, 4), (6, in_channels, 9, 6, 5), (in_channels, 5, 6, 4), (0, in_channels, 5, 6, 4)]
    return [torch.randn(shape[: len(shape) - 3 + dims]) for shape in shapes]


def examples(in_channels: int, out_channels: int) -> Mapping[str, nn.Module]:
    """PEFT models of one layer."""
    C, N, config = in_channels, out_channels, lora.config
    frozen = tuner.layer(nn.Conv2d(C, N, 3), config())
    frozen.base_model.model[0].lora_A.requires_grad_(False)
    return models(C, N, config) | {
        "lora_bias": tuner.layer(nn.Conv2d(C, N, 3), config(lora_bias=True)),
        "lora_A frozen": frozen,
        "two adapters": tuner.layer(nn.Conv2d(C, N, 3), config(), config(r=7, lora_alpha=3)),
    }


LORA = register(
    Method(
        name="LoRA of convolutions",
        of="LoRA",
        taxonomy="reparameterised",
        family="L",
        layer="peft.tuners.lora.layer.Conv2d",
        also=("peft.tuners.lora.layer.Conv1d", "peft.tuners.lora.layer.Conv3d"),
        adapters="lora_A",
        base=base,
        held=held,
        apply=apply,
        examples=examples,
        inputs=inputs,
        build=tuner.builder("LoraConfig"),
        op="convolution",
        saves="x if lora_A trains, and its convolution with lora_A where that is made in forward",
        merges="W + s B A",
        tested={"peft": ((0, 21), (0, 21))},
    )
)

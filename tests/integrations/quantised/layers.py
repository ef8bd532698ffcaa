"""Layers of each library, and models of them: the same ones for the same seed."""

from __future__ import annotations

import contextlib
import warnings

import torch
from bitsandbytes import nn as bnb
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from optimum.quanto import freeze, qint4, qint8
from optimum.quanto import quantize as quanto
from peft import get_peft_model
from torch import nn
from torchao import quantization as ao


def four_bits(linear: nn.Linear, kind: str = "nf4", nested: bool = False, compute_dtype=None) -> nn.Module:
    """bitsandbytes' ``Linear4bit`` of this layer."""
    layer = bnb.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, compute_dtype, nested, quant_type=kind
    )
    layer.weight = bnb.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=nested, quant_type=kind, module=layer
    )
    layer.bias = linear.bias
    return layer.to("cpu")


def eight_bits(linear: nn.Linear, threshold: float = 6.0) -> nn.Module:
    """bitsandbytes' ``Linear8bitLt``, with the threshold that transformers' configuration has by default."""
    layer = bnb.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=threshold
    )
    layer.weight = bnb.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.to("cpu")


def torchao(linear: nn.Linear) -> nn.Module:
    """An ``nn.Linear`` whose weight is an ``Int8Tensor``."""
    ao.quantize_(linear, ao.Int8WeightOnlyConfig())
    return linear


def quanto_linear(linear: nn.Linear, weights=qint8) -> nn.Module:
    """quanto's ``QLinear``, frozen."""
    model = nn.Sequential(linear)
    quanto(model, weights=weights)
    freeze(model)
    return model[0]


def hqq(linear: nn.Linear) -> nn.Module:
    """HQQ's own layer, 4 bits along K."""
    config = BaseQuantizeConfig(nbits=4, group_size=16, axis=1)
    return HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")


LIBRARIES = {
    "nf4": four_bits,
    "fp4": lambda linear: four_bits(linear, "fp4"),
    "nf4 nested": lambda linear: four_bits(linear, nested=True),
    "int8": eight_bits,
    "torchao int8": torchao,
    "quanto qint8": quanto_linear,
    "quanto qint4": lambda linear: quanto_linear(linear, qint4),
    "hqq": hqq,
}


def adapted(model: nn.Module, library: str, config) -> nn.Module:
    """PEFT's model, with random adapters, in the classes that it has for this library."""
    model.is_loaded_in_4bit = library.startswith(("nf4", "fp4"))
    model.is_loaded_in_8bit = library == "int8"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao: merging asks for more than training
        model = get_peft_model(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("ia3_l", "magnitude", "lora_E", "lambda")):
                p.mul_(torch.empty_like(p).uniform_(0.5, 1.5)) if "lora_E" not in name else p.uniform_(0.5, 1.5)
    return model


def layer(library: str, config, dtype=torch.float32, sizes=(64, 96), seed: int = 0) -> nn.Module:
    """PEFT's model of one layer (K, N)."""
    torch.manual_seed(seed)
    return adapted(nn.Sequential(LIBRARIES[library](nn.Linear(*sizes, dtype=dtype))), library, config)


def results(model: nn.Module, x: torch.Tensor, autocast: bool = False, **options) -> dict[str, torch.Tensor]:
    """y, and the gradients of the input and of all that trains, for a random output gradient."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        y = model(x, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y.float() * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads}

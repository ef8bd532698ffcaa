"""Weights and layers of the libraries as bases: shared storage, the same output and gradients, what is refused."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import nn as bnb
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from optimum.quanto import freeze, qfloat8_e5m2, qint2, qint4, qint8
from optimum.quanto import quantize as quanto
from torch import nn
from torch.nn import functional as F
from torchao import quantization as ao

from peftkern import lora_linear, multi_lora_linear
from peftkern.autograd.row_norm import row_norm
from peftkern.bases.base import base_of, kind_of

K, N, R = 128, 48, 4


def plain(bias=False):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias)


def four_bits(of=K, **options):
    layer = bnb.Linear4bit(of, N, bias=False, compute_dtype=torch.float32, **options)
    layer.load_state_dict({"weight": torch.randn(N, of, generator=torch.Generator().manual_seed(0))})
    return layer.to("cpu")


def eight_bits():
    layer = bnb.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
    layer.load_state_dict(plain().state_dict())
    return layer.to("cpu")


def torchao(config):
    model = nn.Sequential(plain())
    ao.quantize_(model, config)
    return model[0]


def quanto_layer(qtype):
    model = nn.Sequential(plain())
    quanto(model, weights=qtype)
    freeze(model)
    return model[0]


def hqq(bits=4, axis=1, dtype=torch.float32, **options):
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis, **options)
    return HQQLinear(plain(), config, compute_dtype=dtype, device="cpu")


# A layer of a library, what of it is a base, the kind, and where its codes are.
LAYERS = {
    "nf4": (lambda: four_bits(quant_type="nf4", compress_statistics=False), "weight", "nf4"),
    "nf4 nested": (lambda: four_bits(quant_type="nf4"), "weight", "nf4"),
    "fp4": (lambda: four_bits(quant_type="fp4"), "weight", "fp4"),
    "nf4 as bf16": (lambda: four_bits(quant_type="nf4", quant_storage=torch.bfloat16), "weight", "nf4"),
    "Linear4bit": (lambda: four_bits(quant_type="nf4"), None, "nf4"),
    "Int8Params": (eight_bits, "weight", "int8"),
    "Linear8bitLt": (eight_bits, None, "int8"),
    "torchao int8": (lambda: torchao(ao.Int8WeightOnlyConfig()), "weight", "int8"),
    "torchao fp8": (lambda: torchao(ao.Float8WeightOnlyConfig()), "weight", "fp8"),
    "quanto qint8": (lambda: quanto_layer(qint8), "weight", "int8"),
    "quanto qfloat8": (lambda: quanto_layer(qfloat8_e5m2), "weight", "fp8"),
    "quanto qint4": (lambda: quanto_layer(qint4), "weight", "quanto4"),
    "hqq": (hqq, None, "hqq4"),
    "hqq bf16": (lambda: hqq(dtype=torch.bfloat16), None, "hqq4"),
}


def storage(t):
    for name in ("qdata", "_data", "_data", "W_q"):
        t = getattr(t, name, t)
    return t.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", LAYERS)
def test_shares_storage_and_multiplies_as_the_library(name):
    make, part, kind = LAYERS[name]
    layer = make()
    weight = layer if part is None else layer.weight
    base = base_of(weight)
    assert base.kind == kind and base.shape == (N, K)
    assert base.tensors[0].untyped_storage().data_ptr() == storage(layer if name.startswith("hqq") else layer.weight)
    dtype = torch.bfloat16 if name == "hqq bf16" else torch.float32
    # The library's own product of the rows of an identity is its weight.
    x, A, B = torch.randn(6, K), torch.randn(R, K), torch.randn(N, R)
    W = kind_of(kind).dequantise(base.tensors, torch.float32, base.shape)
    close = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.bfloat16: dict(rtol=2e-2, atol=2e-2)}[dtype]
    close = dict(rtol=1e-2, atol=1e-2) if kind == "int8" and part != "weight" else close  # it quantises x as well
    if name != "Int8Params":  # its scales go to the layer then
        torch.testing.assert_close(layer(torch.eye(K, dtype=dtype)).t().float(), W, **close)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    dy = torch.randn(6, N)
    y, expected = lora_linear(x, weight, A, B, scaling=0.5), F.linear(x, W + 0.5 * B @ A)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        row_norm(weight, A, B, 0.5), (W + 0.5 * B @ A).norm(dim=1).detach(), rtol=1e-5, atol=1e-5
    )
    ids = torch.tensor([0, -1, 0, 0, -1, 0])
    mixed = torch.where((ids < 0)[:, None], x @ W.t(), expected)
    torch.testing.assert_close(multi_lora_linear(x, weight, [(A, B, 0.5)], ids), mixed, rtol=1e-4, atol=1e-4)


def test_a_layer_that_has_run_holds_its_scales_itself():
    layer = eight_bits()
    before = base_of(layer)
    layer(torch.randn(2, K))
    with pytest.raises(ValueError, match="has handed its scales to its layer: pass the Linear8bitLt"):
        base_of(layer.weight)
    for a, b in zip(before.tensors, base_of(layer).tensors, strict=True):
        assert torch.equal(a, b)


def test_half_of_the_block_lies_in_the_next_row():
    # 96 columns, blocks of 64: the library's own CPU kernel takes other scales there, its quantisation does not
    # (findings/bitsandbytes_cpu_blocks_across_rows.sh).
    layer = four_bits(96, quant_type="nf4")
    W = torch.randn(N, 96, generator=torch.Generator().manual_seed(0))
    base = base_of(layer)
    ours = kind_of("nf4").dequantise(base.tensors, torch.float32, (N, 96))
    assert (ours - W).norm() / W.norm() < 0.11


def packed_for_inference():
    layer = four_bits(quant_type="nf4").eval()
    layer.weight.quant_state.packing_format_for_cpu = True
    return layer


REFUSED = {
    "dynamic int8": (lambda: torchao(ao.Int8DynamicActivationInt8WeightConfig()).weight, "gives no gradient through the layer"),
    "torchao intx": (lambda: torchao(ao.IntxWeightOnlyConfig(torch.int4)).weight, "this tensor of torchao is none of the kinds"),
    "quanto qint2": (lambda: quanto_layer(qint2).weight, "is qint2 of shape"),
    "hqq in 8 bits": (lambda: hqq(bits=8), "has 8 bits along axis 1"),
    "hqq along axis 0": (lambda: hqq(axis=0), "has 4 bits along axis 0"),
    "packed": (packed_for_inference, "has repacked this Params4bit for inference"),
    "4 bits too early": (lambda: bnb.Linear4bit(K, N).weight, "is not quantised yet"),
    "8 bits too early": (lambda: bnb.Linear8bitLt(K, N, has_fp16_weights=False), "is not quantised yet"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        base_of(make())


def test_dynamic_int8_gives_no_gradient():
    """Why it is refused."""
    layer, x = torchao(ao.Int8DynamicActivationInt8WeightConfig()), torch.randn(3, K, requires_grad=True)
    y = layer(x)
    assert (
        not y.requires_grad or not torch.autograd.grad(y.sum(), x, allow_unused=True, materialize_grads=True)[0].any()
    )


def test_what_is_no_weight_of_a_library():
    with pytest.raises(TypeError, match="weight must be a tensor, got Linear"):
        base_of(plain())

"""``LoRALinear.from_linear`` of quantised layers and of bases: PEFT's results, the layer's keys, no merge."""

from __future__ import annotations

import copy

import pytest
import torch
from bitsandbytes import nn as bnb
from peft import LoraConfig
from torch import nn
from torchao import quantization as ao

import peftkern
from peftkern import LoRALinear
from peftkern.bases.base import Base
from peftkern.testing.bases import dequantised

from .layers import LIBRARIES, eight_bits, layer, results

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
AUTOCAST = [name for name in LIBRARIES if name != "hqq"]  # whose backward fails for a trained input there
CHILD = "base_model.model.0."


def _pair(library, dtype=torch.float32, **options):
    """(ours, PEFT's model with the same adapter)."""
    stock = layer(library, LoraConfig(target_modules=["0"], r=4, init_lora_weights=False, **options), dtype)
    torch.manual_seed(0)
    ours = LoRALinear.from_linear(LIBRARIES[library](nn.Linear(64, 96, dtype=dtype)), 4, 8, **options)
    theirs = stock.state_dict()
    with torch.no_grad():
        ours.lora_A.copy_(theirs[CHILD + "lora_A.default.weight"])
        ours.lora_B.copy_(theirs[CHILD + "lora_B.default.weight"])
        if ours.use_dora:
            ours.lora_magnitude.copy_(theirs[CHILD + "lora_magnitude_vector.default.weight"])
    return ours.train(), stock.train()


def _agree(ours, stock, autocast, tolerance):
    found, expected = results(ours, X.to(stock.dtype_in), autocast), results(stock, X.to(stock.dtype_in), autocast)
    names = {"y": "y", "dx": "dx", "lora_A": CHILD + "lora_A.default.weight", "lora_B": CHILD + "lora_B.default.weight"}
    if ours.use_dora:
        names["lora_magnitude"] = CHILD + "lora_magnitude_vector.default.weight"
    assert found.keys() == names.keys() and set(expected) == set(names.values())
    for name, theirs in names.items():
        assert found[name].dtype == expected[theirs].dtype, name
        error = (found[name].double() - expected[theirs].double()).abs().max()
        assert error <= tolerance * expected[theirs].double().abs().max(), name


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_peft(library, options):
    ours, stock = _pair(library, **options)
    stock.dtype_in = torch.float32
    _agree(ours, stock, False, 2e-6)


@pytest.mark.parametrize(
    ("library", "autocast"), [*((library, False) for library in LIBRARIES), *((name, True) for name in AUTOCAST)]
)
def test_half_precision(library, autocast):
    ours, stock = _pair(library, torch.float32 if autocast else torch.bfloat16)
    stock.dtype_in = torch.float32 if autocast else torch.bfloat16
    _agree(ours, stock, autocast, 2e-2)


@pytest.mark.parametrize("library", LIBRARIES)
def test_keys_and_sharing(library):
    torch.manual_seed(0)
    base = LIBRARIES[library](nn.Linear(64, 96))
    keys = set(base.state_dict())
    ours = LoRALinear.from_linear(base, 4, use_dora=True)
    assert set(ours.state_dict()) == keys | {"lora_A", "lora_B", "lora_magnitude"}
    assert set(nn.Sequential(ours).state_dict()) == {f"0.{key}" for key in ours.state_dict()}
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == ["lora_A", "lora_B", "lora_magnitude"]
    assert ours.base_layer is base and ours.bias is base.bias and (ours.in_features, ours.out_features) == (64, 96)
    assert torch.allclose(ours(X), base.train()(X), atol=2e-5)  # a new layer is its base
    with pytest.raises(RuntimeError, match="merge: the weight is in codes"):
        ours.merge()


@pytest.mark.parametrize("library", ["int8", "torchao int8"])
def test_a_checkpoint_loads(library):
    (ours, _), other = _pair(library), LoRALinear.from_linear(LIBRARIES[library](nn.Linear(64, 96)), 4, 8)
    assert not torch.allclose(other(X), ours(X), atol=0.1)
    other.load_state_dict(ours.state_dict())
    assert torch.allclose(other(X), ours(X), atol=1e-5)


def test_a_base_that_changes_is_seen():
    (ours, _), (other, _) = _pair("nf4"), _pair("nf4")
    y = ours(X)
    for base in (LIBRARIES["nf4"](nn.Linear(64, 96)), LIBRARIES["int8"](nn.Linear(64, 96))):
        ours.base_layer = base.train()
        assert torch.allclose(ours(X), y - other.base_layer(X) + base(X), atol=1e-5)
    ours.to(torch.bfloat16)
    assert ours(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4", "fp8", "mxfp4"])
def test_a_base(kind):
    torch.manual_seed(0)
    W = torch.randn(96, 64)
    base = peftkern.quantize(W, kind)
    ours = LoRALinear.from_linear(base, 4, use_dora=True)
    nn.init.normal_(ours.lora_B)
    plain = nn.Linear(64, 96, bias=False)
    plain.weight.data = dequantised(base, 96, 64)
    dense = LoRALinear.from_linear(plain, 4, use_dora=True)
    dense.load_state_dict({k: v for k, v in ours.state_dict().items() if "lora" in k} | {"weight": plain.weight})
    for got, want in zip(results(ours, X).values(), results(dense, X).values(), strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    assert ours.weight.data_ptr() == base.tensors[0].data_ptr()
    assert ours.state_dict().keys() >= {"weight", "weight_1"}
    half = copy.deepcopy(ours).to(torch.bfloat16)
    assert [t.dtype for t in half.base_layer.buffers()] == [t.dtype for t in base.tensors]
    assert torch.allclose(half(X.bfloat16()).float(), ours(X), atol=0.3)
    again = LoRALinear.from_linear(peftkern.quantize(torch.randn(96, 64), kind), 4, use_dora=True)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(X), ours(X))


def _dynamic():
    linear = nn.Linear(64, 96)
    ao.quantize_(linear, ao.Int8DynamicActivationInt8WeightConfig())
    return linear


def _hooked():
    base = eight_bits(nn.Linear(64, 96))
    base.register_forward_hook(lambda module, args, y: y * 2)
    return base


@pytest.mark.parametrize(
    ("linear", "error", "why"),
    [
        (_dynamic, TypeError, "no gradient"),
        (_hooked, TypeError, "it carries a hook"),
        (lambda: bnb.Linear4bit(64, 96), TypeError, "not quantised yet"),
        (lambda: Base("int8", peftkern.quantize(torch.randn(9, 8), "int8").tensors), ValueError, "no shape"),
        (lambda: peftkern.quantize(torch.randn(9, 8), "int8")._replace(shape=(8, 8)), ValueError, "int8 codes"),
    ],
)
def test_refused(linear, error, why):
    with pytest.raises(error, match=why):
        LoRALinear.from_linear(linear())


def test_adapters_of_half_precision():
    ours = LoRALinear.from_linear(peftkern.quantize(torch.randn(96, 64), "nf4"), lora_dtype=torch.bfloat16)
    assert ours.lora_A.dtype == torch.bfloat16 and ours(X.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="lora_dtype must be"):
        LoRALinear.from_linear(peftkern.quantize(torch.randn(96, 64), "nf4"), lora_dtype=torch.float64)

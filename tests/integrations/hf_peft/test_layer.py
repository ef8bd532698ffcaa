"""One layer: every setting of an adapter, every dtype, several adapters; against stock and fp64."""

import contextlib

import pytest
import torch
from torch import nn

import peftkern

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def outcome(layer, x, autocast=None):
    """{name: tensor}: the output, and the gradients of x and the parameters for a random output gradient."""
    x = x.detach().clone().requires_grad_(True)
    layer.zero_grad()
    with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
        y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(11))
    y.backward(dy.to(y.dtype))
    grads = {n: p.grad.detach().clone() for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def compare(zoo, model, layer, x, fused, autocast=None, calls=1):
    """Accelerated against stock and fp64, by the error of each output; ``calls``: how many run fused."""
    # The oracle sees what the call sees: parameters and x in their own dtypes, then everything in fp64.
    exact_layer = zoo.copy(layer).double()
    exact = outcome(exact_layer, x.double())
    stock = outcome(layer, x, autocast)
    report = peftkern.accelerate(model)
    before = len(fused)
    ours = outcome(layer, x, autocast)
    assert len(fused) - before == calls
    assert ours.keys() == stock.keys() == exact.keys()
    for name in ours:
        zoo.as_accurate(ours[name], stock[name], exact[name])
    return report


SETTINGS = {
    "plain": {},
    "no base bias": {"bias": False},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "lora_bias without base bias": {"lora_bias": True, "bias": False},
    "rank 1": {"r": 1},
    "rank above K": {"r": 33},
    "dropout in eval mode": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (24,), (0, 24)], ids=str)
def test_settings(zoo, fused, setting, shape):
    model, layer = zoo.layer(**SETTINGS[setting])
    model.eval()
    compare(zoo, model, layer, torch.randn(shape), fused)


@pytest.mark.parametrize(
    "base, x, adapter, autocast, calls",
    [
        (FP32, FP32, FP32, None, 1),
        (BF16, BF16, FP32, None, 1),  # what PEFT users have by default
        (BF16, BF16, BF16, None, 1),
        (FP16, FP16, FP32, None, 1),
        (FP64, FP64, FP64, None, 1),
        (FP64, FP64, FP32, None, 1),
        (FP32, FP32, FP32, BF16, 1),
        (BF16, BF16, FP32, BF16, 1),
        (BF16, FP32, FP32, BF16, 1),
        (FP32, BF16, FP32, BF16, 1),
        (FP32, FP32, BF16, BF16, 1),
        (FP16, FP32, FP32, BF16, 1),
        (FP32, FP32, BF16, None, 0),  # PEFT narrows x to bf16 here: its own code does that
        (FP16, FP16, BF16, None, 0),
    ],
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_dtypes(zoo, fused, base, x, adapter, autocast, calls):
    model, layer = zoo.layer(dtype=base, lora_bias=True)
    layer.lora_A.to(adapter), layer.lora_B.to(adapter)
    compare(zoo, model, layer, torch.randn(6, 24).to(x), fused, autocast, calls)


@pytest.mark.parametrize("x", [BF16, FP64])
def test_an_input_of_another_dtype_fails_as_in_stock(zoo, x):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(3, 24).to(x))


def test_input_casting_can_be_disabled(zoo, fused):
    from peft.helpers import disable_input_dtype_casting

    model, layer = zoo.layer(dtype=BF16)
    peftkern.accelerate(model)
    x = torch.randn(3, 24, dtype=BF16)
    with disable_input_dtype_casting(model):
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x)
        layer.lora_A.to(BF16), layer.lora_B.to(BF16)
        layer(x)
    assert len(fused) == 1


@pytest.mark.parametrize("trained", ["x", "lora_A", "lora_B", "base bias", "nothing"])
def test_what_is_frozen_gets_no_gradient(zoo, fused, trained):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    model.requires_grad_(False)
    x = torch.randn(4, 24, requires_grad=trained == "x")
    parameter = {
        "x": x,
        "lora_A": layer.lora_A["default"].weight,
        "lora_B": layer.lora_B["default"].weight,
        "base bias": layer.base_layer.bias,
    }.get(trained)
    if parameter is None:
        assert not layer(x).requires_grad
    else:
        parameter.requires_grad_(True)
        layer(x).sum().backward()
        assert parameter.grad.abs().sum() > 0
        assert not any(p.grad is not None for p in layer.parameters() if p is not parameter)
    assert len(fused) == 1


@pytest.mark.parametrize("bias", [True, False])
def test_conv1d_base_is_used_transposed(zoo, fused, bias):
    from transformers.pytorch_utils import Conv1D

    options = {"r": 4, "fan_in_fan_out": True, "lora_bias": bias, "init_lora_weights": False}
    config = zoo.peft.LoraConfig(target_modules=["0"], **options)
    model = zoo.randomise(zoo.peft.get_peft_model(nn.Sequential(Conv1D(20, 24)), config))
    compare(zoo, model, model.base_model.model[0], torch.randn(2, 3, 24), fused)


def several(zoo, **options):
    """A layer with three active adapters of different rank, scaling and bias."""
    model, layer = zoo.layer(**options)
    added = {"b": {"r": 3, "lora_alpha": 5}, "c": {"r": 6, "lora_alpha": 1, "lora_bias": True}}
    for name, settings in added.items():
        config = zoo.peft.LoraConfig(target_modules=["0"], init_lora_weights=False, **settings)
        model.add_adapter(name, config)
    zoo.randomise(model)
    model.base_model.set_adapter(["default", "b", "c"])
    return model, layer


@pytest.mark.parametrize("scaling", ["as configured", "all equal", "tensor", "scaled"])
def test_several_active_adapters_add_up(zoo, fused, scaling):
    model, layer = several(zoo)
    if scaling == "all equal":
        layer.scaling = dict.fromkeys(layer.scaling, 2.0)
    elif scaling == "tensor":
        layer.scaling["b"] = torch.tensor(1.5)
    elif scaling == "scaled":
        layer.scale_layer(0.5)
    compare(zoo, model, layer, torch.randn(5, 24), fused)


def test_several_adapters_of_several_dtypes(zoo, fused):
    model, layer = several(zoo, dtype=BF16)
    layer.lora_A["b"].to(BF16), layer.lora_B["b"].to(BF16)
    compare(zoo, model, layer, torch.randn(5, 24).to(BF16), fused)


def test_one_adapter_of_several_is_absent_from_the_layer(zoo, fused):
    model, layer = several(zoo)
    layer.set_adapter(["b", "elsewhere"])
    compare(zoo, model, layer, torch.randn(5, 24), fused)
    assert fused[-1][1].scaling == pytest.approx(5 / 3)


@pytest.mark.parametrize("scaling", [torch.tensor(0.75), torch.tensor([0.75]), 2, 0.0, -1.5], ids=str)
def test_scaling_as_number_or_tensor(zoo, fused, scaling):
    model, layer = zoo.layer(lora_bias=True)
    layer.scaling["default"] = scaling
    compare(zoo, model, layer, torch.randn(5, 24), fused)


def test_hotswap_with_tensor_scaling(zoo, fused, tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    model, layer = zoo.layer()
    other, _ = zoo.layer(r=2, lora_alpha=6)
    zoo.randomise(other, seed=9).save_pretrained(tmp_path)
    x = torch.randn(5, 24)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    peftkern.accelerate(model)
    model.eval(), other.eval()
    layer(x)
    hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert isinstance(layer.scaling["default"], torch.Tensor)
    torch.testing.assert_close(model(x), other(x), rtol=1e-5, atol=1e-5)
    assert len(fused) == 2


def test_the_output_may_be_changed_in_place(zoo, fused):
    model, layer = zoo.layer()
    x = torch.randn(2, 5, 24)
    results = []
    for accelerated in (False, True):
        if accelerated:
            peftkern.accelerate(model)
        layer.zero_grad()
        y = layer(x).mul_(2.0).relu_()
        y.square().sum().backward()
        with torch.no_grad():
            z = layer(x)
        results.append(
            (y.detach(), layer.lora_A["default"].weight.grad.clone(), z.add_(layer.lora_B["default"].weight[0, 0]))
        )
    assert len(fused) == 2
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_weights_that_are_plain_attributes(zoo, fused):
    # FSDP1 and DataParallel put a tensor where the Parameter was.
    model, layer = zoo.layer(lora_bias=True)
    leaves = []
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        for name in [n for n, p in module._parameters.items() if p is not None]:
            value = module._parameters.pop(name).detach().clone()
            leaves.append(value.requires_grad_(module is not layer.base_layer))
            setattr(module, name, value)
    x = torch.randn(5, 24)
    expected = torch.autograd.grad(layer(x).sum(), leaves[2:])
    peftkern.accelerate(model)
    for a, b in zip(torch.autograd.grad(layer(x).sum(), leaves[2:]), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(fused) == 1

"""``accelerate`` on PEFT's layers over quantised bases: stock's results to rounding, and what stays the library's."""

from __future__ import annotations

import peft
import pytest
import torch
from bitsandbytes import nn as bnb
from optimum.quanto import qint8
from optimum.quanto import quantize as quanto
from peft import AdaLoraConfig, IA3Config, LoraConfig, RandLoraConfig, RoadConfig, VeraConfig
from torch import nn
from torchao import quantization as ao

import peftkern
from peftkern.settings import using

from .layers import LIBRARIES, adapted, eight_bits, four_bits, layer, results

AT = {"target_modules": ["0"]}
METHODS = {
    "LoRA": lambda: LoraConfig(**AT, r=4, init_lora_weights=False),
    "DoRA": lambda: LoraConfig(**AT, r=4, init_lora_weights=False, use_dora=True),
    "AdaLoRA": lambda: AdaLoraConfig(**AT, init_r=4, target_r=2, total_step=10),
    "(IA)^3": lambda: IA3Config(**AT, feedforward_modules=[]),
    "(IA)^3 inside": lambda: IA3Config(**AT, feedforward_modules=["0"]),
    "RandLoRA": lambda: RandLoraConfig(**AT, r=4, init_weights=False),
    "RoAd": lambda: RoadConfig(**AT, variant="road_2", group_size=32, init_weights=False),
    "VeRA": lambda: VeraConfig(**AT, r=8, init_weights=False),
}
X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _small():
    with using(small_calls=True):
        yield


def accelerated(*args, **options):
    model = layer(*args, **options)
    report = peftkern.accelerate(model)
    assert len(report.accelerated) == 1, str(report)
    return model


def reason(model) -> str:
    report = peftkern.accelerate(model)
    assert not report.accelerated
    return next(iter(report.skipped.values()))


def agree(ours, stock, tolerance):
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        assert ours[name].dtype == expected.dtype, name
        error = (ours[name].double() - expected.double()).abs().max()
        assert error <= tolerance * expected.double().abs().max(), (name, error)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("method", METHODS)
def test_stock_in_fp32(method, library):
    if (library == "hqq" and method not in ("LoRA", "DoRA", "VeRA")) or (library, method) == ("torchao int8", "VeRA"):
        with pytest.raises((AttributeError, TypeError, ValueError)):
            layer(library, METHODS[method]())  # PEFT has no layer for it
        return
    ours = accelerated(library, METHODS[method]())
    agree(results(ours, X), results(layer(library, METHODS[method]()), X), 2e-6)
    assert peftkern.status(ours).fused == 1 and not peftkern.status(ours).stock


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("autocast", [False, True])
def test_lora_in_half_precision(library, autocast):
    # Each is within the rounding of its own: of y, of the delta that the library rounds apart, and of its weight.
    dtype, config = torch.bfloat16, METHODS["LoRA"]
    ours = results(accelerated(library, config(), dtype), X.to(dtype), autocast)
    agree(ours, results(layer(library, config(), dtype), X.to(dtype), autocast), 2e-2)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("library", ["nf4", "int8", "torchao int8", "quanto qint8"])
def test_fp32_under_autocast_has_stocks_dtype(library, train):
    config = METHODS["LoRA"]
    ours, stock = accelerated(library, config()).train(train), layer(library, config()).train(train)
    agree(results(ours, X, True), results(stock, X, True), 2e-2)
    assert peftkern.status(ours).fused == 1


@pytest.mark.parametrize("method", ["AdaLoRA", "(IA)^3", "RandLoRA", "RoAd"])
def test_what_bitsandbytes_layers_widen_stays_theirs(method):
    ours, stock = accelerated("int8", METHODS[method]()), layer("int8", METHODS[method]())
    y, expected = ours(X.bfloat16()), stock(X.bfloat16())
    assert y.dtype == expected.dtype == torch.float32 and torch.equal(y, expected)
    assert "makes fp32 of half precision" in peftkern.status(ours).reasons["base_model.model.0"]


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_a_compute_dtype_rounds_stock_alone(compute):
    def model():
        torch.manual_seed(0)
        return adapted(nn.Sequential(four_bits(nn.Linear(64, 96), compute_dtype=compute)), "nf4", METHODS["LoRA"]())

    ours, stock, exact = model(), model(), layer("nf4", METHODS["LoRA"]())
    # PEFT makes adapters in the compute dtype before it widens them.
    exact.load_state_dict({name: t for name, t in stock.state_dict().items() if "lora_" in name}, strict=False)
    assert peftkern.accelerate(ours).accelerated
    y, expected, oracle = ours(X), stock(X), exact(X)
    assert y.dtype == expected.dtype == torch.float32
    assert (y - oracle).abs().max() < 1e-5 < (expected - oracle).abs().max()


@pytest.mark.parametrize("library", ["nf4", "int8", "torchao int8"])
def test_dora_with_dropout(library):
    # The mask is not stock's: what a seed of torch's gives is the same twice, and training differs from eval.
    ours = accelerated(library, LoraConfig(**AT, r=4, init_lora_weights=False, use_dora=True, lora_dropout=0.5))
    a, b = ((torch.manual_seed(5), results(ours, X))[1] for _ in range(2))
    agree(a, b, 0.0)
    assert not torch.equal(a["y"], ours.eval()(X)) and peftkern.status(ours).fused == 3


@pytest.mark.parametrize("library", ["nf4", "int8", "hqq", "quanto qint8"])
def test_adapter_names(library):
    names = ["default", "__base__", "other"]
    x = torch.randn(3, 4, 64)

    def build():
        model = layer(library, METHODS["LoRA"]())
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(**AT, r=7, init_lora_weights=False))
        return model

    ours, stock, rows = build(), build(), []
    assert peftkern.accelerate(ours).accelerated
    for row, name in zip(x, names):
        with stock.disable_adapter() if name == "__base__" else torch.enable_grad():
            stock.set_adapter("default" if name == "__base__" else name)
            rows.append(stock(row))
    assert torch.allclose(ours(x, adapter_names=names), torch.stack(rows), atol=2e-6, rtol=1e-5)
    assert peftkern.status(ours).fused == 1


def test_a_base_that_changes_is_seen():
    config = METHODS["LoRA"]
    ours, other = accelerated("nf4", config()), layer("nf4", config(), seed=1)
    before, base = ours(X), ours.base_model.model[0]
    branch = before - base.base_layer(X)
    base.base_layer = other.base_model.model[0].base_layer  # replaced
    assert torch.allclose(ours(X) - base.base_layer(X), branch, atol=1e-5)
    base.base_layer.weight.quant_state.absmax = base.base_layer.weight.quant_state.absmax * 2  # another scale
    assert torch.allclose(ours(X) - base.base_layer(X), branch, atol=1e-5)
    base.base_layer.to(torch.bfloat16).to(torch.float32)
    assert torch.allclose(ours(X) - base.base_layer(X), branch, atol=1e-5)
    ours.merge_adapter()
    merged = ours(X)
    ours.unmerge_adapter()
    assert (ours(X) - merged).abs().max() < 0.5 * branch.abs().max()
    status = peftkern.status(ours)
    assert status.fused == 5 and status.stock == 1


def test_the_scales_of_int8_are_found_wherever_they_are():
    ours, stock = accelerated("int8", METHODS["LoRA"]()), layer("int8", METHODS["LoRA"]())
    expected = results(stock, X)
    agree(results(ours, X), expected, 2e-6)
    with ours.disable_adapter():
        ours(X)  # the library's own call moves them from the weight into the layer's state
    agree(results(ours, X), expected, 2e-6)


def test_a_checkpoint_goes_both_ways(tmp_path):
    ours = accelerated("nf4", METHODS["LoRA"]())
    assert ours.state_dict().keys() == layer("nf4", METHODS["LoRA"]()).state_dict().keys()
    results(ours, X)
    ours.save_pretrained(tmp_path)
    plain = layer("nf4", METHODS["LoRA"]()).unload()
    plain.is_loaded_in_4bit = True
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    assert torch.allclose(loaded(X), ours(X), atol=1e-5)


def _packed():
    model = layer("nf4", METHODS["LoRA"]()).eval()
    with torch.no_grad():
        model(X)
    if not getattr(model.base_model.model[0].base_layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes packs weights on CPUs with AVX512-BF16 alone")
    return model


def _of(base, library):
    return adapted(nn.Sequential(base), library, METHODS["LoRA"]())


def _half():
    return bnb.Linear8bitLt(64, 96, has_fp16_weights=True)


def _dynamic():
    linear = nn.Linear(64, 96)
    ao.quantize_(linear, ao.Int8DynamicActivationInt8WeightConfig())
    return linear


def _unfrozen():
    model = nn.Sequential(nn.Linear(64, 96))
    quanto(model, weights=qint8)
    return model[0]


def _hooked():
    base = eight_bits(nn.Linear(64, 96))
    base.register_forward_hook(lambda module, args, y: y * 2)
    return base


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (_packed, "repacked"),
        (lambda: _of(_half(), "int8"), "half precision"),
        (lambda: _of(_dynamic(), "torchao"), "no gradient"),
        (lambda: _of(_unfrozen(), "quanto"), "freeze it"),
        (lambda: _of(_hooked(), "int8"), "carries a hook"),
        (lambda: layer("nf4", peft.FourierFTConfig(**AT, n_frequency=9)), "FourierFT on a base of kind nf4"),
    ],
    ids=["packed", "half", "dynamic", "unfrozen", "hooked", "a weight that is changed"],
)
def test_not_covered(model, why):
    assert why in reason(model())


@pytest.mark.parametrize("library", ["nf4", "nf4 nested", "int8", "torchao int8"])
def test_compiled(library):
    ours, expected = accelerated(library, METHODS["LoRA"]()), results(layer(library, METHODS["LoRA"]()), X)
    found = results(torch.compile(ours, fullgraph=True, backend="aot_eager"), X)
    agree({name.removeprefix("_orig_mod."): t for name, t in found.items()}, expected, 2e-6)

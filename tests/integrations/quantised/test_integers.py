"""``accelerate(compute="int8")``: which layers it takes, what they then compute, and how it is undone."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import peftkern
from peftkern import lora_linear
from peftkern.bases.base import base_of
from peftkern.settings import using

from .layers import layer, results

CONFIG = dict(target_modules=["0"], r=4, init_lora_weights=False)
INT8 = ("int8", "torchao int8", "quanto qint8")
X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _small():
    with using(small_calls=True):
        yield


def rounded(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """y of its first layer, by the function."""
    of = model.base_model.model[0]
    base, bias = of.base_layer, of.base_layer.bias
    held = base_of(base if type(base).__name__ == "Linear8bitLt" else base.weight)._replace(kind="w8a8")
    A, B = of.lora_A["default"].weight, of.lora_B["default"].weight
    return lora_linear(x, held, A, B, scaling=of.scaling["default"], bias=bias)


@pytest.mark.parametrize("library", INT8)
@pytest.mark.parametrize("dora", [False, True])
def test_int8(library, dora):
    config = peft.LoraConfig(**CONFIG, use_dora=dora)
    stock = results(layer(library, config), X)
    model = layer(library, config)
    report = peftkern.accelerate(model, compute="int8")
    assert report.accelerated, str(report)
    for _ in range(2):  # looked at, and kept
        ours = results(model, X)
        assert ours.keys() == stock.keys()
        if not dora:
            torch.testing.assert_close(ours["y"], rounded(model, X))
        for name in ("y", "dx"):
            error = (ours[name] - stock[name]).norm() / stock[name].norm()
            assert 1e-3 < error < 2e-2, name
    assert peftkern.status(model).fused == 2
    # Without it, from the next call on.
    peftkern.accelerate(model)
    torch.testing.assert_close(results(model, X)["dx"], stock["dx"], rtol=1e-4, atol=1e-4)
    peftkern.accelerate(model, compute="int8")
    assert not torch.allclose(results(model, X)["dx"], stock["dx"], rtol=1e-4, atol=1e-4)
    peftkern.restore(model)
    assert torch.equal(results(model, X)["y"], stock["y"])
    assert not any("peftkern" in key for module in model.modules() for key in module.__dict__)


@pytest.mark.parametrize("library", ["nf4", "hqq"])
def test_other_weights_stay_the_librarys(library):
    config = peft.LoraConfig(**CONFIG)
    model = layer(library, config)
    report = peftkern.accelerate(model, compute="int8")
    assert not report.accelerated
    (reason,) = report.skipped.values()
    assert "compute='int8' is for weights of kind int8, this one is" in reason
    assert torch.equal(results(model, X)["y"], results(layer(library, config), X)["y"])

"""Plans of quantised layers that are kept from call to call: what the layer holds at the moment is what counts."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import peftkern
from peftkern.bases.base import base_of, kind_of
from peftkern.integrations.status import KEY

from .layers import four_bits, layer

CONFIG = LoraConfig(target_modules=["0"], r=4, init_lora_weights=False)


def tuner(model: nn.Module) -> nn.Module:
    return model.get_submodule("base_model.model.0")


def expected(model: nn.Module, x: Tensor) -> Tensor:
    """y by what the layer holds now."""
    of = tuner(model)
    base = base_of(of.base_layer)
    W = kind_of(base.kind).dequantise(base.tensors, torch.float64, (96, 64))
    A, B = (getattr(of, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    return x.double() @ (W + of.scaling["default"] * B @ A).t() + of.base_layer.bias.double()


def kept(model: nn.Module) -> object:
    return tuner(model).__dict__[KEY].kept


def double_scales(base: nn.Module) -> None:
    state = base.weight.quant_state
    (state.state2.absmax if state.nested else state.absmax).mul_(2.0)


def other_scales(base: nn.Module) -> None:
    state = base.weight.quant_state
    if state.nested:
        state.offset = state.offset + 0.1
    else:
        state.absmax = state.absmax * 3.0


def another_state(base: nn.Module) -> None:
    torch.manual_seed(5)
    base.weight.quant_state = four_bits(nn.Linear(64, 96), nested=base.weight.quant_state.nested).weight.quant_state


def another_weight(base: nn.Module) -> None:
    torch.manual_seed(6)
    base.weight = four_bits(nn.Linear(64, 96), nested=not base.weight.quant_state.nested).weight


def another_bias(base: nn.Module) -> None:
    base.bias = nn.Parameter(torch.randn(96), requires_grad=False)


def int8_scales(base: nn.Module) -> None:
    held = base.weight if base.weight.SCB is not None else base.state
    held.SCB.mul_(2.0)


def other_int8_scales(base: nn.Module) -> None:
    held = base.weight if base.weight.SCB is not None else base.state
    held.SCB = held.SCB * 1.5


FOUR = (double_scales, other_scales, another_state, another_weight, another_bias)
CASES = [(library, change) for library in ("nf4", "nf4 nested") for change in FOUR]
CASES += [("int8", change) for change in (int8_scales, other_int8_scales, another_bias)]


@pytest.mark.parametrize("library, change", CASES)
def test_changes_of_a_kept_layer_are_seen(library, change):
    model = layer(library, CONFIG).eval()
    peftkern.accelerate(model)
    x = torch.randn(3, 64)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x).double(), expected(model, x), rtol=1e-5, atol=1e-5)
        first, before = kept(model), model(x)
        assert first is not None  # or this would be no test of it
        change(tuner(model).base_layer)
        torch.testing.assert_close(model(x).double(), expected(model, x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(x), before, atol=1e-3)
    assert peftkern.status(model).stock == 0


@pytest.mark.parametrize("library", ["nf4", "nf4 nested", "int8"])
def test_a_hook_ends_it(library):
    model = layer(library, CONFIG).eval()
    peftkern.accelerate(model)
    x, seen = torch.randn(3, 64), []
    with torch.no_grad():
        for _ in range(2):
            model(x)
        assert kept(model) is not None
        tuner(model).base_layer.register_forward_hook(lambda *args: seen.append(1))
        with pytest.warns(RuntimeWarning, match="carries a hook"):
            model(x)
    assert seen

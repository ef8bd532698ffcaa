"""Every method of the registry agrees with the library that it stands for."""

import copy
import subprocess
import sys

import pytest
import torch

import peftkern
from peftkern.dispatch import registry as dispatch
from peftkern.methods import METHODS, registry

pytest.importorskip("peft", reason="HF PEFT is not installed")


LAYERS = [name for name, method in METHODS.items() if method.layer is not None]


@pytest.mark.parametrize("name", LAYERS)
def test_parity(parity, name):
    parity(METHODS[name])


@pytest.mark.parametrize("autocast", [False, True], ids=["half base", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_half_precision(half_parity, name, dtype, autocast):
    half_parity(METHODS[name], dtype, autocast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_fresh_dora_on_half_precision(agree, on_base, dtype):
    # The library rounds the norms once more when it makes the magnitudes of them: a fresh adapter already changes the layer.
    on_base(dtype)
    stock = METHODS["DoRA"].build(torch.nn.Linear(24, 20), 4)
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    agree(ours, stock, [torch.randn(2, 3, 24).to(dtype) for _ in range(8)], f"a fresh DoRA, {dtype}")
    assert peftkern.status(ours).fused == 8
    layer = stock.base_model.model[0]
    W, m = layer.base_layer.weight.double(), layer.lora_magnitude_vector["default"].weight.double()
    change = (m / W.norm(dim=1) - 1).detach()
    assert not layer.lora_B["default"].weight.any() and change.abs().max() > 0.1 * torch.finfo(dtype).eps
    x = torch.eye(24, dtype=dtype)
    shift = ours(x).double() - ours(torch.zeros_like(x)).double() - W.t()
    assert torch.nn.functional.cosine_similarity((shift * W.t()).sum(0), change, dim=0) > 0.8


@pytest.mark.parametrize("name", METHODS)
def test_an_entry_is_complete(name):
    method = METHODS[name]
    assert method.name == name and method.taxonomy in ("additive", "selective", "reparameterised", "hybrid")
    assert method.family in ("L", "L+phi", "B", "R", "S", "P", "M")
    ops = [name.removesuffix("_fwd") for name in dispatch.OPS] + (dir(torch.ops.aten) if method.of else [])
    assert method.op in ops, f"{method.name}: no op {method.op}"
    assert method.saves and method.merges and (method.tested or method.layer is None)


def test_a_layer_has_one_method():
    entry = next(iter(METHODS.values()))
    with pytest.raises(ValueError, match=f"{entry.name}'s already"):
        registry.register(entry)


def test_the_registry_imports_no_library():
    code = "import sys, peftkern.methods; print([m for m in ('peft', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

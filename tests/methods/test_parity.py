"""Every method of the registry agrees with the library that it stands for."""

import subprocess
import sys

import pytest
import torch

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


@pytest.mark.parametrize("name", METHODS)
def test_an_entry_is_complete(name):
    method = METHODS[name]
    assert method.name == name and method.taxonomy in ("additive", "selective", "reparameterised", "hybrid")
    assert method.family in ("L", "L+phi", "B", "R", "S", "P", "M")
    assert any(name.startswith(method.op) for name in dispatch.OPS), f"{method.name}: no op {method.op}"
    assert method.saves and method.merges and (method.tested or method.layer is None)


def test_a_layer_has_one_method():
    entry = next(iter(METHODS.values()))
    with pytest.raises(ValueError, match=f"{entry.name}'s already"):
        registry.register(entry)


def test_the_registry_imports_no_library():
    code = "import sys, peftkern.methods; print([m for m in ('peft', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

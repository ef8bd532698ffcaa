"""The most memory that a training step of a small model takes at once, over PEFT's: what its tensors hold, op by op."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftkern

pytest.importorskip("peft", reason="HF PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import small_models as small

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Held(TorchDispatchMode):
    """Bytes of the storages that ops have made and that are alive, and the most of them at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def _gone(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage not in before and storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


def _peak(model):
    inputs = small.batch("llama", 0, rows=64, length=16)
    model(**inputs)  # makes what a layer makes once
    with Held() as held:
        model.train()(**inputs).loss.backward()
    return held.peak


def _both(name):
    stock = small.build(name, "llama", LINEAR)
    ours = copy.deepcopy(stock)
    report = peftkern.accelerate(ours)
    assert len(report.accelerated) == len(LINEAR) and not report.skipped
    peaks = _peak(ours), _peak(stock)
    assert peftkern.status(ours).fused == 2 * len(LINEAR)
    return peaks


def test_what_is_counted():
    x = torch.randn(256)
    with Held() as held:
        y = x * 2
        view = y.view(16, 16)
        assert (held.now, held.peak) == (1024, 1024)
        del y
        assert held.now == 1024, "a view holds it"
        del view
        z = x + 1
        z.add_(1)
        assert (held.now, held.peak) == (1024, 1024)


# Where the library makes a weight anew, which is less than (M, R) is in layers as small as these.
WEIGHTS = ("HRA", "LoHa")


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_more_than_lora(name):
    ours, lora = _both(name)[0], _both("LoRA")[0]
    assert ours <= 1.1 * lora, f"{name}: {ours} bytes, LoRA {lora}"


# SHiRA, FRoD: the library's sparse tensors have no storage. PEANuT: (M, R) is kept in place of (N, K), and N and K are small
# here; tests/methods/families/test_folded.py.
NOT_COUNTED = ("SHiRA", "FRoD", "PEANuT")


@pytest.mark.parametrize("name", [name for name in small.TRAINED if name not in (*WEIGHTS, *NOT_COUNTED)])
def test_no_more_than_the_library(name):
    # But for small matrices made of the adapters' own, which count here, where a weight is no larger than they are.
    ours, theirs = _both(name)
    # Lily's branch is made of x A^T, which the op then makes, and keeps, itself.
    assert ours <= (1.1 if name == "Lily" else 1.005) * theirs, f"{name}: {ours} bytes, the library {theirs}"


def test_vera_takes_a_quarter_less():
    ours, theirs = _both("VeRA")
    assert ours <= 0.75 * theirs, f"{ours} bytes, the library {theirs}"

"""``accelerate(compute=...)`` on weights that are not quantised, and what it does not take."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import peftkern


def test_a_dense_layer_stays_the_librarys():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"]))
    report = peftkern.accelerate(model, compute="int8")
    assert not report.accelerated
    assert list(report.skipped.values()) == [
        "its base layer: compute='int8' is for weights of kind int8, this one is dense"
    ]
    assert model(torch.randn(2, 8)).shape == (2, 8)
    assert peftkern.accelerate(model).accelerated


def test_no_such_compute():
    with pytest.raises(ValueError, match="compute is 'int4'"):
        peftkern.accelerate(nn.Linear(2, 2), compute="int4")

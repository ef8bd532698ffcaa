"""RoAd beyond what an example shows: a batch with ``adapter_names``, which the library computes, and bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peftkern
from peftkern.methods import tuner

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")

K, N = 24, 20


def test_a_batch_with_names_is_the_library_s():
    configs = [
        peft.RoadConfig(target_modules=["0"], variant=v, group_size=4, init_weights=False) for v in ("road_1", "road_2")
    ]
    stock = tuner.layer(nn.Linear(K, N), *configs).eval()
    ours, x = copy.deepcopy(stock), torch.randn(3, 5, K)
    names = ["0", "__base__", "default"]
    peftkern.accelerate(ours)
    assert torch.equal(ours(x, adapter_names=names), stock(x, adapter_names=names))
    (reason,) = peftkern.status(ours).reasons.values()
    assert reason == "a batch with adapter_names is not covered for RoAd"


def test_bad_input():
    x, W, v = torch.randn(3, K), torch.randn(N, K), torch.randn(N)
    with pytest.raises(ValueError, match="group_size is 64, expected an even divisor of N = 20"):
        peftkern.road_linear(x, W, v, v)
    with pytest.raises(ValueError, match="road_theta has shape"):
        peftkern.road_linear(x, W, v[:3], v[:3], group_size=4)
    with pytest.raises(ValueError, match="road_alpha"):
        peftkern.road_linear(x, W, v, v[:10], group_size=4)

"""BOFT beyond what an example shows: factors that the library computes with an extension alone, dropout, other permutations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peftkern
from peftkern.methods import tuner
from peftkern.methods.rotation.boft import butterfly

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
boft = pytest.importorskip("peft.tuners.boft.layer")

K, N = 32, 20


class _BlockDiagonal:
    """What the library's CUDA extension computes."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(grad, blocks):
        b, i = blocks.shape[-1], torch.arange(blocks.shape[1])
        return [grad.unflatten(2, (-1, b)).unflatten(1, (-1, b))[:, i, :, i].transpose(0, 1)]


@pytest.fixture
def extension(monkeypatch):
    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: _BlockDiagonal)


def _config(size=4, **options):
    return peft.BOFTConfig(target_modules=["0"], boft_block_size=size, init_weights=False, **options)


def _compare(agree, stock, count=4):
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    agree(ours, stock, [torch.randn(5, K) for _ in range(count)], "BOFT")
    assert peftkern.status(ours).fused == count


@pytest.mark.parametrize("size, factors", [(4, 2), (4, 3), (2, 4), (8, 3)])
def test_factors(extension, agree, size, factors):
    stock = tuner.layer(nn.Linear(K, N), _config(size, boft_n_butterfly_factor=factors))
    assert stock.base_model.model[0].boft_R["default"].shape[0] == factors
    _compare(agree, stock)


def test_adapters_with_factors(extension, agree):
    _compare(agree, tuner.layer(nn.Linear(K, N), *[_config(4, boft_n_butterfly_factor=2)] * 2))


def test_permutations_of_another_adapter_are_the_library_s(extension):
    # The layer has one buffer for them, that of the last adapter; the shapes agree, the order of columns does not.
    stock = tuner.layer(nn.Linear(K, N), _config(4, boft_n_butterfly_factor=2), _config(8, boft_n_butterfly_factor=2))
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    x = torch.randn(5, K)
    assert torch.equal(ours(x), stock(x))
    # Nor does an adapter that comes later, and does not act, go unnoticed.
    one = tuner.layer(nn.Linear(K, N), _config(4, boft_n_butterfly_factor=2))
    peftkern.accelerate(one)
    before = one(x)
    one.add_adapter("later", _config(8, boft_n_butterfly_factor=2))
    one.base_model.set_adapter("default")
    after = one(x)
    peftkern.restore(one)
    torch.testing.assert_close(after, one(x))
    assert not torch.allclose(after, before, atol=1e-3)
    (reason,) = peftkern.status(ours).reasons.values()
    assert reason == "boft_P is not what 'default' was made with"


def test_a_factor_alone_takes_columns_as_they_are():
    for size in (2, 4):
        assert torch.equal(butterfly(16, 16 // size, size, 0, torch.device("cpu")), torch.arange(16))
    assert butterfly(16, 4, 4, 1, torch.device("cpu")).tolist() == [
        0,
        1,
        4,
        5,
        2,
        3,
        6,
        7,
        8,
        9,
        12,
        13,
        10,
        11,
        14,
        15,
    ]


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_dropout_is_drawn_as_the_library_draws_it(p):
    stock = tuner.layer(nn.Linear(K, N), _config(4, boft_dropout=p)).train()
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    x, found = torch.randn(5, K), []
    for model in (ours, stock):
        torch.manual_seed(7)
        y = model(x)
        y.square().sum().backward()
        found.append((y, [p.grad for p in model.parameters() if p.grad is not None], torch.rand(1)))
    torch.testing.assert_close(*found)
    unused = [g.abs().sum((-1, -2)).eq(0).sum() for g in (found[0][1][0],)]
    assert unused == [int(p * 8)] and peftkern.status(ours).fused == 1
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x))


def test_bad_input():
    x, W, s = torch.randn(3, K), torch.randn(N, K), torch.ones(N)
    for shape in ((8, 4, 4), (1, 8, 4, 2), (0, 8, 4, 4), (2, 8, 3, 3), (3, 2, 4, 4)):
        with pytest.raises(ValueError, match="boft_R has shape"):
            peftkern.boft_linear(x, W, torch.randn(shape), s)
    with pytest.raises(ValueError, match="R has shape"):
        peftkern.boft_linear(x, W, torch.randn(1, 7, 4, 4), s)
    with pytest.raises(ValueError, match="oft_R has shape"):
        peftkern.oft_linear(x, W, torch.randn(8, 5))

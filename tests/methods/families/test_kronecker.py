"""What LoKr does in training with its dropouts, as the library's own draws have it, and which layers run its code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peftkern
from peftkern.autograd.maps import kron
from peftkern.methods import METHODS, tuner
from peftkern.methods.kronecker.lokr import Kron
from peftkern.methods.linear import Branch, Linear, run
from peftkern.methods.scale.ia3 import with_ia3

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")

K, N = 24, 20


def _both(linear, *configs):
    stock = tuner.layer(linear, *configs).train()
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    return ours, stock


def _step(model, x, seed):
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"rank_dropout": 0.4},
        {"rank_dropout": 0.4, "rank_dropout_scale": True},
        {"module_dropout": 0.5},
        {"rank_dropout": 0.3, "module_dropout": 0.4},
    ],
    ids=str,
)
def test_dropout(options):
    config = peft.LoKrConfig(target_modules=["0"], r=2, alpha=3, init_weights=False, **options)
    ours, stock = _both(nn.Linear(K, N), config)
    x, seen = torch.randn(5, K), set()
    for seed in range(12):
        got, want = _step(ours, x, seed), _step(stock, x, seed)
        assert len(got) == len(want)
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
        seen.add(got[0][0, 0].item())
    assert len(seen) > 1 and peftkern.status(ours).fused == 12
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x), rtol=1e-5, atol=1e-5)


def test_without_the_whole_matrix(parity, monkeypatch):
    monkeypatch.setattr(kron, "SMALL", 0)
    parity(METHODS["LoKr"])
    parity(METHODS["Lily"])


@pytest.mark.parametrize("autocast", [False, True], ids=["half base", "autocast"])
def test_half_precision_without_the_whole_matrix(half_parity, monkeypatch, autocast):
    monkeypatch.setattr(kron, "SMALL", 0)
    half_parity(METHODS["LoKr"], torch.bfloat16, autocast)


def test_one_scale_and_one_factor():
    # Rows of the change of the weight, scaled by what stands around the layer.
    x, W, w1, w2, g = (torch.randn(*s, dtype=torch.float64) for s in ((5, K), (N, K), (4, 3), (5, 8), (N,)))
    layer = with_ia3(Linear(W).add_term(Kron(w1, w2, 0.5)), g, is_feedforward=False)
    want = g * nn.functional.linear(x, W + 0.5 * torch.kron(w1, w2))
    torch.testing.assert_close(run(layer, x), want)
    # And a branch that is made of x.
    A, B = (torch.randn(*s, dtype=torch.float64) for s in ((2, K), (N, 2)))
    layer = with_ia3(Linear(W).add_made(lambda x: Branch(A, B * x.mean())), g, is_feedforward=False)
    torch.testing.assert_close(run(layer, x), g * (x @ W.t() + x @ A.t() @ B.t() * x.mean()))


def test_factors_as_products():
    x, W, b = (torch.randn(*s, dtype=torch.float64) for s in ((5, K), (N, K), (N,)))
    w1, w2 = [
        tuple(torch.randn(*s, dtype=torch.float64) for s in each) for each in (((4, 2), (2, 3)), ((5, 1), (1, 8)))
    ]
    want = nn.functional.linear(x, W + 0.3 * torch.kron(w1[0] @ w1[1], w2[0] @ w2[1]), b)
    torch.testing.assert_close(peftkern.lokr_linear(x, W, w1, w2, bias=b, scaling=0.3), want)


def test_several_of_c3a_run_the_library_s_code():
    config = peft.C3AConfig(target_modules=["0"], block_size=4, init_weights="gaussian")
    ours, stock = _both(nn.Linear(K, K), config, config)
    x = torch.randn(5, K)
    assert torch.equal(ours(x), stock(x))
    status = peftkern.status(ours)
    assert (status.fused, status.stock) == (0, 1) and "several active adapters" in str(status)


def _hook(part):
    part.register_forward_hook(lambda *args: None)


@pytest.mark.parametrize(
    "config, change, reason",
    [
        ("LoKr", lambda m: m.scaling.update(default=torch.tensor(2.0)), "the scaling of 'default' is a tensor"),
        ("LoKr", lambda m: m.lokr_w1.double(), "the tensors of 'default' differ in dtype"),
        ("Lily", lambda m: m.scaling.update(default=torch.tensor(2.0)), "the scaling of 'default' is a tensor"),
        ("Lily", lambda m: _hook(m.lily_A["default"]), "lily_A carries a hook"),
    ],
)
def test_what_is_left_to_the_library(config, change, reason):
    options = {"stride_A": 1, "num_B": 2} if config == "Lily" else {}
    ours, stock = _both(
        nn.Linear(K, N), getattr(peft, f"{config}Config")(target_modules=["0"], r=2, init_weights=False, **options)
    )
    for model in (ours, stock):
        change(model.base_model.model[0])
    x = torch.randn(5, K)
    assert torch.equal(ours(x), stock(x))
    status = peftkern.status(ours)
    assert (status.fused, status.stock) == (0, 1) and reason in str(status)


def test_the_gradient_of_c3a_s_input():
    # The library's is not that of what it computes; when it is mended, the layers here have to follow.
    ours, stock = _both(nn.Linear(K, N), peft.C3AConfig(target_modules=["0"], block_size=4, init_weights="gaussian"))
    w, x, dy = stock.base_model.model[0].c3a_kernel["default"], torch.randn(5, K), torch.randn(5, N)
    W, found = torch.zeros(N, K), []
    backwards = dy.view(5, -1, 4)[..., [0, 3, 2, 1]].reshape(5, N)

    def change(x):
        return peftkern.c3a_linear(x, W, w)

    for call, grad in ((stock, dy), (ours, dy), (change, dy), (change, backwards)):
        t = x.clone().requires_grad_()
        found.append(torch.autograd.grad(call(t), t, grad)[0])
    base = dy @ stock.base_model.model[0].base_layer.weight
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], base + found[3], rtol=1e-4, atol=1e-5)
    assert (found[0] - base - found[2]).norm() > 0.1 * found[2].norm()


def test_layers_that_inherit_their_forward_are_accelerated_again():
    ours, stock = _both(nn.Linear(K, N), peft.LoKrConfig(target_modules=["0"], init_weights=False))
    x = torch.randn(5, K)
    peftkern.restore(ours)
    assert torch.equal(ours(x), stock(x))
    assert peftkern.accelerate(ours).accelerated
    torch.testing.assert_close(ours(x), stock(x))
    assert peftkern.status(ours).fused == 1


def test_vblora_without_its_logits_does_not_train():
    config = peft.VBLoRAConfig(target_modules=["0"], num_vectors=6, vector_length=4)
    ours, stock = _both(nn.Linear(K, N), config)
    for model in (ours, stock):
        model.base_model.model[0].vblora_logits_A["default"].data[0, 0, 1] = -torch.inf
        with pytest.raises(RuntimeError, match="save_only_topk_weights"):
            model(torch.randn(2, K))
    x = torch.randn(2, K)
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x))

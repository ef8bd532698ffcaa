"""Methods that fold the weight: what they keep, what they leave to the library, what they see change, and what goes with them."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import peftkern
from peftkern.methods import METHODS, tuner
from peftkern.methods.exact import made_of
from peftkern.methods.linear import Branch, Linear, run

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")

FOLDED = ["HiRA", "GLoRA", "SHiRA", "FourierFT", "WaveFT"]


def _bytes(model, x):
    own, seen = {t.untyped_storage().data_ptr() for t in model.parameters()}, {}

    def pack(t):
        if t.layout is torch.strided and t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return sum(t.untyped_storage().nbytes() for t in seen.values()), y


def _case(name, case="linear", K=24, N=20):
    stock = METHODS[name].examples(K, N)[case].train()
    return copy.deepcopy(stock), stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FOLDED)
def test_one_matrix_of_the_weights_size_is_kept(on_base, name, dtype):
    on_base(dtype)
    M, K, N = 3, 144, 120
    ours, stock = _case(name, K=K, N=N)
    peftkern.accelerate(ours)
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    (kept, _), (theirs, _) = _bytes(ours, x), _bytes(stock, x)
    assert peftkern.status(ours).fused == 1
    places = 16 * METHODS[name].rank * (K + N) if name == "SHiRA" else 8 * 4 * 60
    matrix = N * K * (dtype.itemsize if name in ("GLoRA", "SHiRA") else 4)
    assert matrix <= kept <= matrix + 4 * M * K + places + 4096
    assert name == "SHiRA" or kept <= theirs + 8192  # the library's sparse tensors have no storage to count


@pytest.mark.parametrize(
    "name, case", [("HiRA", "linear"), ("MiSS", "bat"), ("FourierFT", "linear"), ("WaveFT", "linear")]
)
def test_adapters_in_half_precision_are_the_librarys(name, case):
    ours, stock = (model.bfloat16() for model in _case(name, case))
    peftkern.accelerate(ours)
    x = torch.randn(5, 24, dtype=torch.bfloat16)
    assert torch.equal(ours(x), stock(x))
    status = peftkern.status(ours)
    assert (status.fused, status.stock) == (0, 1) and "half precision" in str(status)


@pytest.mark.parametrize("name, held_by", [("HiRA", "hira_dropout"), ("FRoD", "frod_dropout")])
def test_dropout_that_acts_is_the_librarys(name, held_by):
    ours, stock = _case(name)
    for model in (ours, stock):
        getattr(model.base_model.model[0], held_by)["default"] = nn.Dropout(0.5)
    peftkern.accelerate(ours)
    x = torch.randn(5, 24)
    torch.manual_seed(1)
    y = ours(x)
    torch.manual_seed(1)
    assert torch.equal(y, stock(x)) and peftkern.status(ours).stock == 1
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x))
    assert peftkern.status(ours).fused == 1


@pytest.mark.parametrize("limit, value", [("MOST", 30 * 64 - 1), ("EACH", 3)])
def test_many_coefficients_of_long_filters_are_the_librarys(monkeypatch, limit, value):
    ours, stock = _case("WaveFT", "sym4")
    monkeypatch.setattr(f"peftkern.methods.folded.waveft.{limit}", value)
    peftkern.accelerate(ours)
    x = torch.randn(5, 24)
    assert torch.equal(ours(x), stock(x)) and peftkern.status(ours).stock == 1


def test_a_wavelet_without_filters_is_the_librarys_error():
    config = peft.WaveFTConfig(target_modules=["0"], n_frequency=30, wavelet_family="db16")
    model = tuner.layer(nn.Linear(24, 20), config)
    peftkern.accelerate(model)
    with pytest.raises(ValueError, match="Unknown wavelet name"):
        model(torch.randn(5, 24))


@pytest.mark.parametrize(
    "name, held_by", [("SHiRA", "shira_indices"), ("FourierFT", "indices"), ("WaveFT", "waveft_indices")]
)
def test_places_that_change_are_seen(name, held_by):
    ours, stock = _case(name)
    peftkern.accelerate(ours)
    x, before = torch.randn(5, 24), None
    for change in (lambda t: t, lambda t: t.copy_(t.flip(1)), lambda t: t.roll(1, 1).clone()):
        for model in (ours, stock):
            indices = getattr(model.base_model.model[0], held_by)
            indices["default"] = change(indices["default"])
        for _ in range(2):
            y = ours(x)
            torch.testing.assert_close(y, stock(x), rtol=1e-4, atol=1e-4)
        assert before is None or not torch.allclose(y, before)
        before = y
    assert peftkern.status(ours).fused == 6


@pytest.mark.parametrize(
    "name, case, held_by",
    [("SHiRA", "linear", "shira_indices"), ("FourierFT", "linear", "indices"), ("WaveFT", "linear", "waveft_indices"),
     ("WaveFT", "no transform", "waveft_indices")],
)  # fmt: skip
def test_places_go_with_their_layer(name, case, held_by):
    ours, _ = _case(name, case)
    peftkern.accelerate(ours)
    indices = getattr(ours.base_model.model[0], held_by)
    indices["default"] = indices["default"].long().clone()
    for _ in range(2):
        ours(torch.randn(5, 24)).sum().backward()
    gone = weakref.ref(indices["default"])
    del ours, indices
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("family", ["db1", "db2", "coif1", "sym5"])
@pytest.mark.parametrize("K, N", [(24, 20), (17, 30), (13, 11)])
def test_wavelets_of_any_size(agree, family, K, N):
    config = peft.WaveFTConfig(target_modules=["0"], n_frequency=11, init_weights=False, wavelet_family=family)
    stock = tuner.layer(nn.Linear(K, N), config).train()
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    agree(ours, stock, [torch.randn(5, K) for _ in range(3)], f"{family}, {K}, {N}")
    assert peftkern.status(ours).fused == 3


@pytest.mark.parametrize("K, N", [(17, 30), (13, 11), (1, 6), (6, 1), (2, 2)])
def test_frequencies_of_any_size(agree, K, N):
    for n in {1, K * N // 2, K * N}:
        config = peft.FourierFTConfig(target_modules=["0"], n_frequency=n, init_weights=False, scaling=5.0)
        stock = tuner.layer(nn.Linear(K, N), config).train()
        ours = copy.deepcopy(stock)
        peftkern.accelerate(ours)
        agree(ours, stock, [torch.randn(5, K) for _ in range(3)], f"{n} of {K} x {N}")
        assert peftkern.status(ours).fused == 3


def test_with_scales_a_bias_and_branches():
    M, K, N, R = 6, 9, 7, 3

    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    x, change, p_b, g_b, added, A, B = (leaf(*s) for s in ((M, K), (N, K), (K,), (N,), (N,), (R, K), (N, R)))
    W, bias = torch.randn(N, K, dtype=torch.float64), leaf(N)
    y = Linear(W, bias, p_b=p_b, g_b=g_b).fold(change).add(Branch(A, B, 0.5)).add_bias(added)
    expected = g_b * ((x * p_b) @ (W + change).t()) + 0.5 * (x @ A.t() @ B.t()) + bias + added
    inputs, dy = (x, change, p_b, g_b, added, A, B, bias), torch.randn(M, N, dtype=torch.float64)
    got = run(y, x)
    torch.testing.assert_close(got, expected)
    for ours, want in zip(*(torch.autograd.grad(t, inputs, dy) for t in (got, expected)), strict=True):
        torch.testing.assert_close(ours, want)


def test_a_small_change_of_a_half_precision_weight_counts():
    W, change = torch.ones(4, 8, dtype=torch.bfloat16), torch.zeros(4, 8)
    change[:, 0] = 2.0**-12  # a sixteenth of an ulp
    x = torch.zeros(1, 8, dtype=torch.bfloat16)
    x[0, :2] = torch.tensor([1.0, -1.0])
    assert torch.equal(run(Linear(W).fold(change), x), change[:, :1].t().bfloat16())


def test_what_is_made_of_a_tensor_follows_other_memory():
    t = torch.arange(4)
    assert torch.equal(made_of(t, torch.neg), -torch.arange(4))
    t.data = torch.arange(4) + 1
    assert torch.equal(made_of(t, torch.neg), -torch.arange(1, 5))

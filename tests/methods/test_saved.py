"""What a layer of each method keeps for backward, beside parameters: no more than its entry says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peftkern
from peftkern.methods import METHODS

pytest.importorskip("peft", reason="HF PEFT is not installed")

M, K, N = 4096, 24, 20
# Name -> whether x is kept, whether the base product is, and columns of (M, .) in fp32, of the method's first example.
KEPT = {
    "LoRA": (1, 0, 4), "DoRA": (1, 1, 4), "KaSA": (1, 0, 4), "MiCA": (1, 0, 0), "VeRA": (0, 0, 9), "PVeRA": (0, 0, 8),
    "AdaLoRA": (1, 0, 6), "DeLoRA": (1, 0, 6), "(IA)^3": (0, 1, 0), "BEFT": (0, 0, 0), "TinyLoRA": (0, 0, 3),
    "OSF": (1, 0, 32), "MiSS": (0, 0, 4), "Uni-LoRA": (1, 0, 4), "HRA": (1, 0, 4), "LoHa": (1, 0, 4),
    "PSOFT": (0, 0, 4), "GraLoRA": (1, 0, 8), "BD-LoRA": (1, 0, 4), "DEFT": (1, 0, 4),
    **dict.fromkeys(("HiRA", "GLoRA", "SHiRA", "FourierFT", "WaveFT", "FRoD"), (1, 0, 0)),
    "LoKr": (1, 0, 0), "C3A": (1, 0, 0), "VB-LoRA": (1, 0, 4), "PEANuT": (1, 0, 4), "Lily": (1, 0, 11),
    "RandLoRA": (0, 0, 20),
    "OFT": (1, 0, 0), "BOFT": (1, 1, 0),
}  # fmt: skip
# Vectors and small matrices.
SMALL = 2 * M
DTYPES = [torch.float32, torch.bfloat16]


def _bytes(call, x, *own):
    """Bytes that a call keeps beside the tensors ``own``."""
    own, seen = {t.untyped_storage().data_ptr() for t in own}, {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t  # keeps it alive: no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call(x)
    assert y.requires_grad
    return sum(t.untyped_storage().nbytes() for address, t in seen.items() if address not in own)


def _of(model, dtype):
    peftkern.accelerate(model)
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    kept = _bytes(model, x, *model.parameters(), *model.buffers())
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (1, 0)
    return kept


def _expected(x, h, columns, dtype):
    return (x * M * K + h * M * N) * dtype.itemsize + 4 * M * columns


def test_every_method_is_here():
    here = {n for n, m in METHODS.items() if m.op != "multi_lora_linear" and m.layer is not None and m.of is None}
    assert KEPT.keys() == here - {"Arrow"}  # torch's composition, which keeps what torch keeps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KEPT)
def test_first_example(on_base, name, dtype):
    on_base(dtype)
    model = next(iter(METHODS[name].examples(K, N).values())).train(METHODS[name].trains)
    expected = _expected(*KEPT[name], dtype)
    assert expected <= _of(model, dtype) <= expected + SMALL


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_frozen_is_not_kept(on_base, dtype):
    on_base(dtype)
    lora = METHODS["LoRA"].examples(K, N)["lora_A frozen"]
    assert _of(lora, dtype) <= _expected(0, 0, 4, dtype) + SMALL
    dora = METHODS["DoRA"].examples(K, N)["linear"]
    dora.base_model.model[0].lora_magnitude_vector.requires_grad_(False)
    assert _of(dora, dtype) <= _expected(1, 0, 4, dtype) + SMALL
    dora.base_model.model[0].lora_A.requires_grad_(False)
    assert _of_again(dora, dtype) <= _expected(0, 0, 4, dtype) + SMALL
    inside = METHODS["(IA)^3"].examples(K, N)["input"]
    assert _of(inside, dtype) <= _expected(1, 0, 0, dtype) + SMALL


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name, case, R", [("LoRA", "lora_A frozen", 4), ("VeRA", "linear", 9)], ids=["LoRA-FA", "VeRA"]
)
def test_the_rank_alone(on_base, name, case, R, dtype, p):
    # Nothing beyond (M, R) in fp32, of which the frozen linear layer keeps nothing, and the dropout's seed.
    on_base(dtype)
    model = METHODS[name].examples(K, N)[case].train()
    for part in model.modules():
        if isinstance(part, nn.ModuleDict) and any(isinstance(m, nn.Identity) for m in part.values()):
            part.update(dict.fromkeys(part, nn.Dropout(p)))
    kept = _of(model, dtype)
    assert kept <= 4 * M * R + 8 * (p > 0), kept
    frozen, x = nn.Linear(K, N, dtype=dtype).requires_grad_(False), torch.randn(M, K, dtype=dtype, requires_grad=True)
    assert _bytes(frozen, x, *frozen.parameters()) == 0


def _of_again(model, dtype):
    peftkern.status(model, reset=True)
    return _of(model, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dora_that_drops(on_base, dtype):
    # As LoRA, and the base product of what is left of x, in fp32: neither a mask nor what is left.
    on_base(dtype)
    stock = METHODS["DoRA"].examples(K, N)["linear"].train()
    stock.base_model.model[0].lora_dropout["default"] = nn.Dropout(0.3)
    ours, x = copy.deepcopy(stock), torch.randn(M, K, dtype=dtype, requires_grad=True)
    lora = _expected(1, 0, 4, dtype)
    kept, theirs = _of(ours, dtype), _bytes(stock, x, *stock.parameters())
    assert lora + 4 * M * N <= kept <= lora + 4 * M * N + SMALL, (kept, theirs)
    assert kept < 0.6 * theirs, (kept, theirs)
    ours.base_model.model[0].lora_magnitude_vector.requires_grad_(False)
    assert _of_again(ours, dtype) <= lora + SMALL


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions(dtype):
    x, W = torch.randn(M, K, dtype=dtype, requires_grad=True), torch.randn(N, K, dtype=dtype)
    scale, shift = (torch.randn(N, requires_grad=True) for _ in range(2))
    kept = _bytes(lambda x: peftkern.ssf_linear(x, W, scale, shift), x, W, scale, shift)
    assert kept <= _expected(0, 1, 0, dtype) + SMALL
    A, B = torch.randn(5, K), torch.randn(N, 5)
    d, b = (torch.randn(n, requires_grad=True) for n in (5, N))
    kept = _bytes(lambda x: peftkern.vera_linear(x, W, A, B, d, b, dropout_p=0.5, training=True), x, W, A, B, d, b)
    assert kept <= _expected(0, 0, 5, dtype) + SMALL


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module(dtype):
    layer = peftkern.LoRALinear(K, N, r=5, use_dora=True, dtype=dtype)
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    assert _bytes(layer, x, *layer.parameters()) <= _expected(1, 1, 5, dtype) + SMALL
    layer.lora_magnitude.requires_grad_(False)
    assert _bytes(layer, x, *layer.parameters()) <= _expected(1, 0, 5, dtype) + SMALL

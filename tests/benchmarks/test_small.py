"""``python -m peftkern.benchmarks.small models``: what is built, and what the command says."""

from __future__ import annotations

import json

import pytest
from torch import nn

import peftkern
from peftkern.benchmarks import small

pytest.importorskip("peft", reason="HF PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50)


def test_dora_is_on_every_linear_layer():
    (words,) = (words for words in small.MODELS if "DoRA" in words)
    model, _ = small.MODELS[words]()
    report = peftkern.accelerate(model)
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith("base_layer")]
    assert len(report.accelerated) == len(linear) == 6 * 6 + 1 and not report.skipped
    assert all(m.use_dora["default"] for m in model.modules() if hasattr(m, "use_dora"))


def test_models_by_their_names(monkeypatch, tmp_path, capsys):
    tiny = {f"tiny, {name}": lambda options=options: small.encoder(TINY, 2, 5, **options)
            for name, options in (("LoRA", {}), ("DoRA", {"use_dora": True}))}  # fmt: skip
    monkeypatch.setattr(small, "MODELS", tiny)
    file = tmp_path / "small.json"
    assert small.main(["models", "--only", "DoRA", "--seconds", "0", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["which"] == "tiny, DoRA" and row["speed_up"] > 0
    with pytest.raises(SystemExit):
        small.main(["models", "--only", "no such"])
    assert "no model's name has 'no such'; there are tiny, LoRA; tiny, DoRA" in capsys.readouterr().err

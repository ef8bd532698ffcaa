"""Small models trained with every method of the op lora_linear: the library's losses, and checkpoints that the library
loads. aLoRA has its tests in tests/integrations/hf_peft."""

from __future__ import annotations

import warnings

import pytest
import torch

import peftkern
from peftkern.methods import METHODS

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import small_models as small  # noqa: E402  (it imports transformers)

PAIRS = [
    (name, kind) for name in small.TRAINED for kind in small.MODELS
    if (kind != "gpt2" or "Conv1D" in METHODS[name].examples(8, 8)) and (kind == "llama" or METHODS[name].family != "S")
]  # fmt: skip


@pytest.mark.parametrize("name, kind", PAIRS)
def test_trains_as_the_library_does(name, kind, tmp_path):
    stock, ours = small.build(name, kind), small.build(name, kind)
    report = peftkern.accelerate(ours)
    layers = [n for n, m in ours.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    assert report.accelerated == layers and len(layers) >= 3 and not report.skipped, report
    expected = small.train(stock, kind)
    assert small.train(ours, kind) == pytest.approx(expected, rel=1e-5)
    assert expected[-2] < 0.999 * expected[0], "of the same batch"
    status = peftkern.status(ours)
    assert (status.fused, status.stock) == (small.STEPS * len(layers), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, on saving by its own rules
        ours.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(small.base(kind)[0], tmp_path)
    inputs = small.batch(kind, 5)
    del inputs["labels"]
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(**inputs).logits, loaded.eval()(**inputs).logits)

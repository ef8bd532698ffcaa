"""The check of what is generated, before it is timed."""

from __future__ import annotations

import pytest
import torch

import peftkern

pytest.importorskip("peft", reason="HF PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from peftkern.benchmarks import generate

BATCH = generate.Batch(4, 3, 5, 4)


def models(dtype, monkeypatch):
    """PEFT's model and an accelerated one, of the same numbers."""
    monkeypatch.setitem(generate.SIZES, 64, (2, 96, 4))
    stock, ours = (generate.model_of(3, 4, 64, dtype) for _ in range(2))
    assert not peftkern.accelerate(ours).skipped
    return stock, ours


@pytest.mark.parametrize("dtype", generate.DTYPES)
@torch.inference_mode()
def test_another_adapter_is_seen(dtype, monkeypatch):
    stock, ours = models(dtype, monkeypatch)
    assert generate.wrong(stock, ours, BATCH) is None
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "lora_B.adapter1" in name:
                p.mul_(-4)
    assert generate.wrong(stock, ours, BATCH).startswith("DIFFERS from")

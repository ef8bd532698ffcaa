"""Small models trained with every method of the op lora_linear: the library's losses, and checkpoints that the library
loads. aLoRA has its tests in tests/integrations/hf_peft."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import nn

import peftkern
from peftkern.methods import METHODS

peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import small_models as small  # noqa: E402  (it imports transformers)

RANK = 4
# What a method needs beside the config that its benchmark has: a schedule, names of layers, or values that a small model
# learns by.
OPTIONS = {
    "VeRA": lambda targets: {"d_initial": 0.5},
    "AdaLoRA": lambda targets: {"target_r": 2, "tinit": 2, "tfinal": 4, "total_step": small.STEPS},
    "DeLoRA": lambda targets: {"delora_lambda": 4},
    "(IA)^3": lambda targets: {"feedforward_modules": targets[-1:]},
    "OSF": lambda targets: {"effective_rank": 3},
    "Uni-LoRA": lambda targets: {"theta_d_length": 64},
}


def _pairs():
    for name, method in METHODS.items():
        # Arrow routes among adapters that are trained already: test_arrow.py.
        if method.op == "lora_linear" and method.layer is not None and method.trains and name != "Arrow":
            known = method.examples(8, 8)
            yield from ((name, kind) for kind in small.MODELS if kind != "gpt2" or "Conv1D" in known)


def _build(name, kind):
    config = METHODS[name].build(nn.Linear(16, 16), RANK).peft_config["default"]
    base, targets = small.base(kind)
    options = {"target_modules": targets, "task_type": small.task(kind)}
    if hasattr(config, "fan_in_fan_out"):
        options["fan_in_fan_out"] = kind == "gpt2"
    if name in OPTIONS:
        options |= OPTIONS[name](targets)
    return peft.get_peft_model(base, dataclasses.replace(config, **options))


@pytest.mark.parametrize("name, kind", list(_pairs()))
def test_trains_as_the_library_does(name, kind, tmp_path):
    stock, ours = _build(name, kind), _build(name, kind)
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

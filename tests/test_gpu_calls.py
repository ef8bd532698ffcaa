"""What the GPU tests call (tests/gpu/calls.py), run on CPU tensors, so that a GPU's time is not lost to a mistake there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).with_name("gpu")))
import calls

sys.path.pop(0)


@pytest.mark.parametrize("name", calls.NAMES)
def test_calls_run_and_change(name):
    with calls.using("reference"):
        call = calls.call(name, "cpu")
        first, again = call.run(), call.run()
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, again, strict=True))
        addresses = {k: t.data_ptr() for k, t in call.inputs.items()}
        calls.change(call)
        assert {k: t.data_ptr() for k, t in call.inputs.items()} == addresses
        assert not any(torch.equal(a, b) for a, b in zip(first, call.run(), strict=True))


def test_ids_alone_change_the_result():
    with calls.using("reference"):
        for name in ("multi_lora_linear", "multi_lora_linear-vectors", "sgmv"):
            call = calls.call(name, "cpu")
            first = call.run()[0]
            call.inputs["ids"].copy_(call.inputs["ids"].roll(1))
            assert not torch.equal(call.run()[0], first)


def test_calls_name_their_ops():
    from peftkern.dispatch import registry as dispatch

    assert [c.name for c in calls.calls("cpu")] == list(calls.NAMES)
    for call in calls.calls("cpu"):
        assert set(call.ops) <= set(dispatch.OPS)
        assert calls.unable(call, "reference") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_no_back_end_is_able():
    for call in calls.calls("cpu"):
        assert all(calls.unable(call, backend) for backend in ("cuda", "triton"))


def test_using_restores_the_setting(monkeypatch):
    from peftkern.dispatch import tuned
    from peftkern.problem import Problem
    from peftkern.settings import current

    problem = Problem("x", "cuda", "sm_90", torch.bfloat16, None, 1, 1, 1, 1)
    monkeypatch.delenv("PEFTKERN_BACKEND", raising=False)
    with calls.using("cuda"):
        assert current().backend == "auto" and tuned.entry(problem, current()).candidate == "cuda"
    assert current().backend == "auto" and current().candidate == "measured"
    monkeypatch.setenv("PEFTKERN_BACKEND", "triton")
    with calls.using("reference"):
        assert current().backend == "reference"
    assert current().backend == "triton"


def test_what_a_sanitizer_runs(capsys):
    assert calls.main(["reference", "cpu"]) == 0
    assert capsys.readouterr().out.count("runs") == len(calls.NAMES)

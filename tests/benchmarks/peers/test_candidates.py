"""Providers that force one way of peftkern's: they are what they say while they run, and say why where they cannot."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from peftkern import settings
from peftkern.benchmarks.core.case import Case, Provider
from peftkern.benchmarks.measure.runner import Runner, Settings
from peftkern.benchmarks.ops import lora_linear, multi_lora_linear
from peftkern.benchmarks.peers import candidates
from peftkern.benchmarks.registry import OPS

CASE = Case("lora_linear", "cpu", torch.float32, torch.float32, 24, 40, 32, 4, 0.0)
CUDA = candidates.LINEAR[0]
FUSED = next(way for way in candidates.LINEAR if way.base == "fused")


def test_settings_hold_inside_and_are_put_back(monkeypatch):
    monkeypatch.delenv("PEFTKERN_BACKEND", raising=False)
    with candidates.active(CUDA):
        assert settings.current().backend == "cuda"
    assert "PEFTKERN_BACKEND" not in os.environ
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")
    with pytest.raises(ZeroDivisionError), candidates.active(CUDA):
        raise ZeroDivisionError
    assert settings.current().backend == "reference"


def test_dispatch_is_told_what_was_measured(monkeypatch):
    monkeypatch.setenv("PEFTKERN_BACKEND", "triton")
    with candidates.active(candidates.MULTI[0]):
        assert settings.current().candidate == "cuda" and settings.current().backend == "auto"
    assert settings.current().candidate == "measured" and settings.current().backend == "triton"


def test_the_owner_of_the_base_product_is_forced():
    pytest.importorskip("triton")
    with candidates.active(FUSED):
        assert settings.current().triton_fixed == (("base", "fused"),) and settings.current().backend == "triton"
    assert settings.current().triton_fixed == ()


def test_every_way_is_a_provider_of_both_ops():
    ways = {f"peftkern_{way.suffix}" for way in candidates.LINEAR}
    assert ways <= set(lora_linear.PROVIDERS)
    for name in ("peftkern", "peftkern_bank", "sgmv_add"):
        assert {name, f"{name}_cuda", f"{name}_triton"} <= set(multi_lora_linear.PROVIDERS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_reasons_without_a_gpu():
    for op in OPS.values():
        for provider in op.providers.values():
            if isinstance(provider.around, type):
                continue
            reason = provider.unusable(dataclasses.replace(CASE, device="cuda"))
            assert reason is not None and reason.startswith(candidates.NOT_HERE) and "\n" not in reason


def test_a_back_end_without_the_kernel_is_a_reason(monkeypatch):
    from peftkern.dispatch.choose import load

    back_end = load("cuda")
    monkeypatch.setattr(back_end, "unavailable", lambda now: None)
    monkeypatch.setattr(back_end, "OPS", {"lora_linear_fwd": None})
    monkeypatch.setattr(candidates, "device_arch", lambda device, index: "sm_90")
    reason = candidates.unusable(CUDA, lora_linear.OPS)
    case = dataclasses.replace(CASE, device="cuda")
    assert "no kernel for lora_linear_bwd" in reason(case)
    only = candidates.unusable(CUDA, ("lora_linear_fwd",))
    assert only(dataclasses.replace(case, dtype=torch.bfloat16)) is None
    assert "not torch.float32" in only(case) and "the tensors are on cpu" in only(CASE)


def test_a_base_in_codes_has_reasons_of_its_own(monkeypatch):
    from peftkern.dispatch.choose import load

    monkeypatch.setattr(load("cuda"), "unavailable", lambda now: None)
    monkeypatch.setattr(candidates, "device_arch", lambda device, index: "sm_90")
    reason = candidates.unusable(candidates.CODED[0], ("lora_linear_fwd",), "nf4")
    case = dataclasses.replace(CASE, device="cuda", dtype=torch.bfloat16, M=64)
    assert reason(case) is None and "up to 64 rows" in reason(dataclasses.replace(case, M=65))
    assert "forward" in candidates.unusable(candidates.CODED[0], lora_linear.OPS, "nf4")(case)


def test_the_cuda_kernels_take_what_they_have_of_many_adapters(monkeypatch):
    from types import SimpleNamespace

    from peftkern.backends.cuda import multi_lora_linear as cuda_multi
    from peftkern.dispatch.choose import load

    monkeypatch.setattr(load("cuda"), "unavailable", lambda now: None)
    monkeypatch.setattr(candidates, "device_arch", lambda device, index: "sm_90")
    built = SimpleNamespace(cuda_sgmv_in_clusters=lambda *a: True, cuda_sgmv_takes=lambda *a: True)
    monkeypatch.setattr(cuda_multi.native, "_C", built)
    case = Case("multi_lora_linear", "cuda", torch.bfloat16, torch.bfloat16, 64, 64, 64, 16, 0.0, 4, "uniform", 0.0,
                "same", "decode")  # fmt: skip
    for name in ("peftkern_cuda", "peftkern_bank_cuda", "sgmv_add_cuda"):
        assert multi_lora_linear.PROVIDERS[name].unusable(case) is None
    dropped = dataclasses.replace(case, dropout=0.1, phase="training")
    assert "no kernel with dropout" in multi_lora_linear.PROVIDERS["peftkern_cuda"].unusable(dropped)


def test_addmm_needs_adapters_in_the_dtype_of_x(monkeypatch):
    from peftkern.dispatch.choose import load

    monkeypatch.setattr(load("triton"), "unavailable", lambda now: None)
    reason = lora_linear.PROVIDERS["peftkern_addmm"].unusable
    case = dataclasses.replace(CASE, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(candidates, "device_arch", lambda device, index: "sm_90")
    assert "addmm_ takes adapters in the activation's dtype" in reason(case)
    assert reason(dataclasses.replace(case, adapter_dtype=torch.bfloat16)) is None


def test_steps_and_checks_run_inside_the_context_and_a_reason_is_no_failure():
    from peftkern.benchmarks.bench import failures

    seen = []

    def gate(case):
        seen.append(settings.current().backend)
        return None

    def forced(name, **changes):
        return dataclasses.replace(lora_linear.PROVIDERS["peftkern"], name=name, **changes)

    reference = candidates.Candidate("reference", "reference", "reference")
    providers = {
        "ours": forced("ours", around=lambda: candidates.active(reference)),
        "absent": forced("absent", unusable=lambda case: f"{candidates.NOT_HERE}because"),
        "broken": forced("broken", unusable=lambda case: 1 / 0),
    }
    assert all(isinstance(p, Provider) for p in providers.values())
    built = lora_linear.PROVIDERS["peftkern"].build

    def build(case, data):
        step = built(case, data)

        def forward(i):
            seen.append(settings.current().backend)
            return step.forward(i)

        return dataclasses.replace(step, forward=forward)

    providers["ours"] = dataclasses.replace(providers["ours"], build=build)
    bench = dataclasses.replace(
        lora_linear.BENCH, providers=lora_linear.PROVIDERS | providers, plan=lambda *a: list(providers), gate=gate
    )  # fmt: skip
    rows = next(Runner(bench, Settings(preset="quick", seconds=0.01, bandwidth=1e10, min_repeats=2)).run([CASE]))
    by = {r["provider"]: r for r in rows if r["pass"] == "fwd_bwd"}
    # The gate, the count of saved bytes, one warm step and two rounds.
    assert seen == ["reference"] * 5 and by["ours"]["median_ms"] > 0
    assert by["absent"]["skipped"] == "not here: because" and "ZeroDivisionError" in by["broken"]["skipped"]

    class Console:
        def print(self, *args, **kwargs):
            pass

    assert failures([by["absent"]], bench, Console()) == 0 and failures([by["broken"]], bench, Console()) == 1

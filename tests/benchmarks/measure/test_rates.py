"""The peak of a CPU: of which dtypes one is measured, and that a product stays below it."""

from __future__ import annotations

import time

import pytest
import torch

from peftkern.backends.cpu import native
from peftkern.benchmarks.measure import rates

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(native._C is None, reason="the C++ extension is not built")


@pytest.fixture(autouse=True)
def widest():
    native.use_isa("auto")


def _features(monkeypatch, *features):
    monkeypatch.setattr(rates.doctor, "cpu", lambda: {"features": list(features)})


def test_what_is_widened_has_the_peak_of_fp32(monkeypatch):
    _features(monkeypatch, "avx2")
    found = rates.fma_peaks(DTYPES, 1)
    assert list(found) == ["fp32", "bf16", "fp16"] and found["fp16"] == found["fp32"] > 1e8
    assert (found["bf16"] > found["fp32"]) == native._C.base_gemm_bf16_usable()


def test_a_dtype_with_faster_instructions_has_no_peak(monkeypatch):
    monkeypatch.setattr(rates, "SECONDS", 0.01)
    _features(monkeypatch, "avx512f", "amx_tile", "amx_bf16")
    assert list(rates.fma_peaks(DTYPES, 1)) == ["fp32", "fp16"]
    _features(monkeypatch, "avx512f", "avx512_fp16")
    assert list(rates.fma_peaks(DTYPES, 1)) == ["fp32", "bf16"]
    assert list(rates.cpu_rates()["fma_gflop_per_s"]) == ["fp32", "bf16"]


def test_no_extension_no_peak(monkeypatch):
    monkeypatch.setattr(rates.native, "_C", None)
    assert rates.fma_peaks(DTYPES, 1) == {}


def test_no_product_beats_the_peak():
    x, w, peak, best, threads = torch.randn(128, 512), torch.randn(128, 512), 0.0, 0.0, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # In turn, so that a machine that is busy for a while is so for both.
        for _ in range(8):
            peak = max(peak, rates.fma_peaks([torch.float32], 1)["fp32"])
            for _ in range(20):
                start = time.perf_counter()
                torch.nn.functional.linear(x, w)
                best = max(best, 2 * 128 * 512 * 128 / (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    assert best < 1.1 * peak

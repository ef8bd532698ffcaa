"""The benchmark's own restatements of published designs, their Triton kernels against fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from peftkern.benchmarks.core.case import Case
from peftkern.benchmarks.ops import lora_linear, multi_lora_linear
from peftkern.benchmarks.peers import split, split_kernels
from peftkern.benchmarks.peers.many_data import make_data

SINGLE = Case("lora_linear", "cpu", torch.float32, torch.float32, 24, 40, 32, 4, 0.0)
MANY = Case("multi_lora_linear", "cpu", torch.float32, torch.float32, 64, 600, 200, 16, 0.0, 5, "uniform", 0.0, "same",
            "decode")  # fmt: skip
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float16, torch.float16)]


@pytest.mark.parametrize("dtype, adapter", DTYPES)
@pytest.mark.parametrize("R, dropout", [(16, 0.1), (5, 0.5)])
def test_split(dtype, adapter, R, dropout):
    case = dataclasses.replace(SINGLE, dtype=dtype, adapter_dtype=adapter, R=R, dropout=dropout)
    assert split.passes_for(torch.empty(1)) is split_kernels
    assert lora_linear.check(lora_linear.PROVIDERS["split"], case) is None


def test_the_passes_are_those_in_torch():
    x, A, y, B = (torch.randn(*shape) for shape in ((37, 130), (5, 130), (37, 70), (70, 5)))
    dropped, mask, S = split_kernels.drop_shrink(x, A, 0.3)
    assert 0.6 < mask.float().mean() < 0.8
    torch.testing.assert_close(dropped, x * mask / 0.7)
    torch.testing.assert_close(S, dropped @ A.t(), rtol=1e-5, atol=1e-5)
    mine, theirs, mask = y.clone(), y.clone(), torch.randint(2, y.shape, dtype=torch.uint8)
    for chosen in (None, mask):
        split_kernels.add_product(mine, S, B, 0.7, chosen)
        split.TorchPasses.add_product(theirs, S, B, 0.7, chosen)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for ours, right in zip(split_kernels.adapter_grad(y, S, B, 0.7), split.TorchPasses.adapter_grad(y, S, B, 0.7)):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name, changes", [
    ("padded", dict(ranks="mixed", R=40)),
    ("padded", dict(mix="sorted", phase="training", M=300)),
    ("padded", dict(dtype=torch.float16)),
    ("padded", dict(dtype=torch.float16, adapter_dtype=torch.float16, mix="zipf", base_share=0.25)),
    ("padded_branch", dict(mix="distinct", adapters=64)),
    ("padded_branch", dict(base_share=1.0)),
])  # fmt: skip
def test_padded(name, changes):
    case = dataclasses.replace(MANY, **changes)
    assert multi_lora_linear.PROVIDERS[name].unusable(case) is None
    assert multi_lora_linear.check(multi_lora_linear.PROVIDERS[name], case) is None


def test_padded_splits_the_sum_and_leaves_base_rows_alone():
    from peftkern.benchmarks.peers.padded import Padded, splits

    assert splits(5, MANY.K) == 3
    data = make_data(dataclasses.replace(MANY, base_share=0.5), 2)
    peer = Padded(data, torch.float32, 0.0)
    for i in range(2):
        x, y = data.x[0].detach(), torch.randn(MANY.M, MANY.N)
        before = y.clone()
        peer.add(y, x, i)
        for row, a in enumerate(data.ids.tolist()):
            if a < 0:
                assert torch.equal(y[row], before[row])
            else:
                A, B, s = data.lists(torch.float32)[i][a]
                torch.testing.assert_close(y[row], before[row] + s * (x[row] @ A.t()) @ B.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op, names", [
    ("lora_linear", ["peftkern_fused", "peftkern_epilogue", "peftkern_overlap", "peftkern_addmm"]),
    ("multi_lora_linear", ["peftkern_bank_triton", "sgmv_add_triton"]),
])  # fmt: skip
def test_forced_ways_are_checked_and_timed(monkeypatch, op, names):
    from peftkern import settings
    from peftkern.benchmarks.measure.runner import Runner, Settings
    from peftkern.kernels import configs

    # Outside of a way's own context, nothing goes to Triton.
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")
    seen = []
    original = configs.base_product

    def spy(*args):
        now = settings.current()
        seen.append((now.backend, dict(now.triton_fixed).get("base", "none")))
        return original(*args)

    monkeypatch.setattr(configs, "base_product", spy)
    case = dataclasses.replace(SINGLE if op == "lora_linear" else dataclasses.replace(MANY, M=12, K=40, N=24), R=8)
    run = Runner(
        multi_lora_linear.BENCH if op != "lora_linear" else lora_linear.BENCH,
        Settings(preset="quick", seconds=0.0, bandwidth=1e10, min_repeats=1, max_repeats=1, providers=tuple(names)),
    )
    rows = [r for r in next(run.run([case])) if r["provider"] in names]
    assert {r["provider"] for r in rows} == set(names)
    assert all(r["skipped"] is None and r["median_ms"] > 0 for r in rows), [r["skipped"] for r in rows]
    if op == "lora_linear":
        assert set(seen) == {("triton", base) for base in ("fused", "epilogue", "overlap", "addmm")}

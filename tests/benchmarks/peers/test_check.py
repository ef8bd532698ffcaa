"""A peer that computes something else is found out before it is timed."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from peftkern.benchmarks.core.case import PASSES, Case
from peftkern.benchmarks.core.populations import adapter_ids
from peftkern.benchmarks.measure.runner import Runner, Settings
from peftkern.benchmarks.ops import lora_linear, multi_lora_linear
from peftkern.benchmarks.peers import hf_peft, padded
from peftkern.benchmarks.peers.addmm import AddmmLoRA
from peftkern.benchmarks.peers.many_data import make_data

CASE = Case("lora_linear", "cpu", torch.float32, torch.float32, 64, 64, 64, 8, 0.1)
MANY = Case("multi_lora_linear", "cpu", torch.float32, torch.float32, 32, 64, 64, 8, 0.0, 3, "uniform", 0.25, "same",
            "decode")  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


def wrong(backward=None, **changed):
    """addmm's provider with a part of its arithmetic changed."""

    class Wrong(AddmmLoRA):
        @staticmethod
        def forward(ctx, x, weight, A, B, scaling, p):
            p = changed.get("p", p)
            y = AddmmLoRA.forward(ctx, x, weight, A, B, scaling, p)
            return y * changed.get("factor", 1.0)

        @staticmethod
        def backward(ctx, dy):
            dropped, weight, A, B, u, mask = ctx.saved_tensors
            dropped, mask = backward(dropped, mask) if backward else (dropped, mask)
            saved = (dropped, weight, A, B, u, mask)
            return AddmmLoRA.backward(types.SimpleNamespace(saved_tensors=saved, scaling=ctx.scaling), dy)

    def build(case, data):
        A, B = data.adapters(case.R, case.adapter_dtype)
        return lora_linear.Step(
            lambda i: Wrong.apply(data.x[i], data.weight[i], A, B, lora_linear.SCALING, case.dropout),
            [[x, A, B] for x in data.x], data.dy,
        )  # fmt: skip

    return dataclasses.replace(lora_linear.PROVIDERS["addmm"], build=build)


def forget_mask(dropped, mask):
    return dropped, None


def halve_x(dropped, mask):
    return dropped * 0.5, mask


def checked(monkeypatch, provider, case):
    monkeypatch.setitem(lora_linear.PROVIDERS, "addmm", provider)
    return lora_linear.check(provider, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_right_passes(monkeypatch, dtype):
    for p in (0.0, 0.1, 0.5):
        case = dataclasses.replace(CASE, dtype=dtype, dropout=p)
        assert checked(monkeypatch, wrong(), case) is None
        for name in ("peft", "addmm", "split"):
            if name != "peft" or not hf_peft.missing():
                assert lora_linear.check(lora_linear.PROVIDERS[name], case) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("provider, message", [
    (wrong(factor=1.1), "computes something else (y: "),
    (wrong(halve_x), "computes something else (dA: "),
    (wrong(forget_mask), "the gradient of x belongs to another output"),
    (wrong(p=0.0), "dropout has another probability"),
    (wrong(p=0.3), "computes something else"),
])  # fmt: skip
def test_what_is_wrong_is_named(monkeypatch, dtype, provider, message):
    assert message in checked(monkeypatch, provider, dataclasses.replace(CASE, dtype=dtype))


def test_a_wrong_peer_is_not_timed():
    bench = dataclasses.replace(
        lora_linear.BENCH, check=lambda p, case: "computes something else" if p.name == "addmm" else None
    )
    settings = Settings(preset="quick", seconds=0.01, bandwidth=1e10, min_repeats=2, providers=("addmm", "split"))
    rows = {(r["provider"], r["pass"]): r for r in next(Runner(bench, settings).run([CASE]))}
    for which in PASSES:
        assert rows["addmm", which]["median_ms"] is None and rows["split", which]["median_ms"] > 0
        assert rows["addmm", which]["skipped"] == "computes something else"
    settings.gate = False
    rows = {(r["provider"], r["pass"]): r for r in next(Runner(bench, settings).run([CASE]))}
    assert rows["addmm", "fwd"]["median_ms"] > 0


def test_many_adapters_mixed_up_are_found():
    provider = multi_lora_linear.PROVIDERS["loop"]
    assert multi_lora_linear.check(provider, MANY) is None

    # The data are made inside: ids that the peer sees are not those of the oracle.
    original = multi_lora_linear.make_data
    mixed = dataclasses.replace(provider, build=lambda case, data: provider.build(case, _flipped(original, case)))
    assert "computes something else (y: " in multi_lora_linear.check(mixed, MANY)


def _flipped(make, case):
    data = make(case, 1)
    data.ids.copy_(data.ids.flip(0))
    return data


def test_tiles_of_padded_rows():
    ids = torch.tensor([2, -1, 0, 0, 2, 0, 0, 0], dtype=torch.int32)
    order, tiles = padded.tiles(ids, rows=3)
    assert order.tolist() == [2, 3, 5, 6, 7, 0, 4]
    assert tiles.tolist() == [[0, 0, 3], [0, 3, 5], [2, 5, 7]]
    order, tiles = padded.tiles(torch.full((4,), -1))
    assert order.numel() == 0 and tiles.shape == (0, 3)


def test_sorted_population_is_blocks_of_rows():
    assert adapter_ids("sorted", 3, 9, 0.0).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    ids = adapter_ids("sorted", 4, 100, 0.5)
    taken = ids[ids >= 0]
    assert taken.numel() == 50 and taken.tolist() == sorted(taken.tolist())


def test_on_a_gpu_every_block_rotates():
    case = dataclasses.replace(CASE, device="cuda", M=8192, K=4096, N=4096, dtype=torch.bfloat16)
    cache = 50 << 20
    for M, copies in ((8192, 2), (512, 4)):
        assert lora_linear.copies(dataclasses.replace(case, M=M), cache) == copies
    many = dataclasses.replace(MANY, device="cuda", M=4096, K=4096, N=4096, phase="training", dtype=torch.bfloat16)
    from peftkern.benchmarks.peers.many_data import copies as many_copies

    assert many_copies(many, cache) == 3
    assert len(make_data(dataclasses.replace(MANY, dtype=torch.float32), 3).weight) == 3

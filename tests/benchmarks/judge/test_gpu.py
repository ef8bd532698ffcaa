"""The verdict on a GPU's result, on rows made by hand: no GPU wrote any of these numbers."""

from __future__ import annotations

import json

import pytest

from peftkern.benchmarks import report
from peftkern.benchmarks.judge.lora_linear import slow_half
from peftkern.benchmarks.registry import OPS

COMMON = dict(device="cuda", dtype="bf16", K=4096, R=16, skipped=None, bytes_bound_fraction=0.5, floor_ratio=1.0,
              ratio_to_fp32_base=None, graph=False, launches=3)  # fmt: skip


def row(provider, ms, *, M=8192, N=4096, dropout=0.1, adapter="fp32", which="fwd_bwd", base=10.0, **more):
    made = COMMON | dict(
        op="lora_linear", M=M, N=N, provider=provider, dropout=dropout, adapter_dtype=adapter, median_ms=ms,
        ratio_to_base=None if ms is None else ms / base,
    )  # fmt: skip
    made["pass"] = which
    return made | more


def many(provider, ms, *, M=64, adapters=64, adapter="bf16", which="fwd", graph=True, **more):
    made = dict(mix="distinct", base_share=0.0, ranks="same", phase="decode" if M == 64 else "training")
    made |= dict(op="multi_lora_linear", adapters=adapters, graph=graph)
    return row(provider, ms, M=M, adapter=adapter, which=which, dropout=0.0, **(made | more))


def figures(rows, op="lora_linear"):
    return {f.name: f for f in OPS[op].judge({"header": {"op": op, "cpu": {"features": []}}, "rows": rows})}


def test_each_shape_is_held_by_itself():
    rows = [row("peftkern", 10.9), row("peftkern", 10.4, which="fwd"),
            row("peftkern", 10.7, N=14336), row("peftkern", 10.6, N=14336, which="fwd")]  # fmt: skip
    found = figures(rows)
    name = "bf16 8192x4096x{}: {} over the frozen linear"
    assert found[name.format(4096, "forward + backward")].ok is False
    assert found[name.format(4096, "forward")].ok is True
    assert found[name.format(14336, "forward + backward")].ok is True
    assert found[name.format(14336, "forward")].ok is False
    assert found[name.format(14336, "forward")].value == pytest.approx(1.06)


def test_only_the_stated_case_is_judged():
    others = [row("peftkern", 99.0, **change) for change in (
        dict(M=2048), dict(dropout=0.0), dict(adapter="bf16"), dict(R=64), dict(dtype="fp16"), dict(K=1024),
        dict(device="cpu"),
    )]  # fmt: skip
    found = figures([*others, row("peftkern", 10.5)])
    assert found["bf16 8192x4096x4096: forward + backward over the frozen linear"].value == pytest.approx(1.05)


def test_peft_is_as_users_run_it():
    rows = [row("peftkern", 10.0), row("peft", 15.9), row("peft", 99.0, adapter="bf16"), row("peft", 99.0, which="fwd")]
    faster = figures(rows)["bf16 8192x4096x4096: forward + backward, faster than PEFT"]
    assert faster.value == pytest.approx(1.59) and faster.ok is False
    assert figures([row("peftkern", 10.0), row("peft", 16.0)])[faster.name].ok is True


def test_no_row_is_slower_than_addmm():
    rows = [row("peftkern", 10.0, M=512), row("addmm", 9.0, M=512), row("peftkern", 10.0), row("addmm", 10.0)]
    worst = figures(rows)["worst row over the addmm_ function"]
    assert worst.ok is False and worst.value == pytest.approx(10 / 9) and "512" in worst.note
    assert figures(rows[2:])["worst row over the addmm_ function"].ok is True


def test_forced_ways_are_told():
    rows = [row("peftkern", 10.4), row("peftkern_cuda", 10.3), row("peftkern_fused", None, skipped="not here: why")]
    found = figures(rows)
    told = found["bf16 8192x4096x4096: forward + backward, peftkern_cuda"]
    assert told.ok is None and told.value == pytest.approx(1.03)
    assert not any("peftkern_fused" in name for name in found)


def test_decoding():
    base = many("base", 1.0, adapter=None, launches=1)
    good = [base, many("sgmv_add", 0.2, bytes_bound_fraction=0.71), many("peftkern_bank", 1.3, launches=3)]
    found = figures(good, "multi_lora_linear")
    share, beyond = (found[f"bf16, 64 rows, 64 bf16 adapters: {what}"]
                     for what in ("branch, share of copy bandwidth", "launches beyond the frozen linear"))  # fmt: skip
    assert share.ok is True and share.value == pytest.approx(0.71) and beyond.ok is True and beyond.value == 2
    bad = [base, many("sgmv_add", 0.2, bytes_bound_fraction=0.69), many("peftkern_bank", 1.3, launches=4)]
    found = figures(bad, "multi_lora_linear")
    assert found[share.name].ok is False and found[beyond.name].ok is False


def test_a_branch_outside_of_a_graph_is_no_pass():
    rows = [many("sgmv_add", 0.2, bytes_bound_fraction=0.9, graph=False)]
    found = figures(rows, "multi_lora_linear")["bf16, 64 rows, 64 bf16 adapters: branch, share of copy bandwidth"]
    assert found.ok is False and "CUDA graph" in found.note


def test_nothing_measured_is_no_verdict():
    rows = [row("peftkern", None, skipped="out of memory"), many("sgmv_add", None, bytes_bound_fraction=None)]
    for op, own in (("lora_linear", rows[:1]), ("multi_lora_linear", rows[1:]), ("multi_lora_linear", [])):
        assert all(f.ok is None for f in figures(own, op).values())


def test_prefill_is_told():
    rows = [many("peftkern", 11.0, M=4096, adapters=8, mix="sorted", which="fwd_bwd")]
    found = figures(rows, "multi_lora_linear")
    name = "bf16, 4096x4096x4096, 8 bf16 adapters, fwd_bwd: peftkern over the frozen linear"
    assert found[name].value == pytest.approx(1.1) and found[name].ok is None


def test_report_judges_by_device(tmp_path, capsys):
    file = tmp_path / "r.json"
    header = dict(op="lora_linear", device="A GPU", gpu={"arch": "sm_90"})
    file.write_text(json.dumps({"header": header, "rows": [row("peftkern", 10.9)], "reruns": []}))
    assert report.main(["--judge", str(file)]) == 1
    out = capsys.readouterr().out
    assert "MISSED" in out and "8192x4096x4096: forward + backward over the frozen linear" in out
    file.write_text(json.dumps({"header": header, "rows": [row("peftkern", 10.2)], "reruns": []}))
    assert report.main(["--judge", str(file)]) == 0


def test_a_gpu_is_never_taken_for_a_slow_half_precision_machine():
    rows = [row("base", 10.0, adapter=None, dropout=None)]
    assert not slow_half(rows, "bf16")

"""Floors and shares in tables: columns of results that have them, with results from before beside."""

from __future__ import annotations

import pytest

from peftkern.benchmarks import report
from peftkern.benchmarks.tables import bottleneck, method_times
from peftkern.benchmarks.tables.shares import FLOOR, SHARES, cells, floor, heads, shares

NEW = dict(floor_ratio=0.4, floor_by="flops", flops_bound_fraction=0.8, bytes_bound_fraction=0.1)
OLD = dict(floor_ratio=1.02, bytes_bound_fraction=0.1)


def test_cells():
    assert floor([NEW]) == "0.400 flops" and shares([NEW]) == "80%, 10%"
    other = NEW | dict(floor_ratio=0.2, floor_by="bytes", flops_bound_fraction=None, bytes_bound_fraction=0.3)
    assert floor([NEW, other]) == "0.300 flops/bytes" and shares([NEW, other]) == "80%, 20%"
    assert floor([]) == floor([OLD]) == "-" and shares([OLD]) == "-, 10%" and shares([]) == "-, -"
    assert heads([OLD, NEW], SHARES) == [SHARES] and heads([OLD], FLOOR, SHARES) == []
    assert cells([NEW], [SHARES, FLOOR]) == ["80%, 10%", "0.400 flops"]


def _row(provider, floors, **more):
    made = dict(
        op="lora_linear", device="cpu", dtype="fp32", M=512, K=64, N=64, R=16, provider=provider, median_ms=5.0,
        ratio_to_base=0.5, ratio_to_fp32_base=0.5, skipped=None, adapter_dtype="fp32", dropout=0.0, saved_bytes=10**6,
    )  # fmt: skip
    return made | {"pass": "fwd_bwd"} | floors | more


def _result(floors, provider="peftkern", **more):
    cpu = {"features": ["avx2"], "torch_isa": "AVX2"}
    rates = dict(fma_gflop_per_s={"fp32": 189.3}, copy_gb_per_s=26.1) if floors is NEW else dict(copy_gb_per_s=26.1)
    header = dict(op="lora_linear", device="A CPU", gpu=None, cpu=cpu, threads=2, commit="c" * 40, date="2026-01-02",
                  versions={"torch": "2.13.0", "peft": "0.21.2"}, **rates)  # fmt: skip
    return {
        "header": header,
        "rows": [_row("base", floors, adapter_dtype=None, dropout=None), _row(provider, floors, **more)],
    }


def test_one_adapter():
    new, old = (report.tables("lora_linear", [_result(floors)]) for floors in (NEW, OLD))
    assert f"| **peftkern** | {FLOOR} | {SHARES} |" in new and "| 0.50 | 0.400 flops | 80%, 10% |" in new
    assert "2 threads, copy 26 GB/s, fp32 peak 189 GFLOP/s, torch" in new
    assert "| **peftkern** |\n" in old and FLOOR not in old and "peak" not in old


@pytest.mark.parametrize("phase", ["training", "decode"])
def test_many_adapters(phase):
    many = dict(adapters=8, mix="uniform", base_share=0.0, ranks="same", phase=phase)
    many |= {"pass": "fwd"} if phase == "decode" else {}
    rows = [_row("base", NEW, **many, adapter_dtype=None, dropout=None), _row("peftkern", NEW, **many)]
    rows += [_row("sgmv", NEW, **many, bytes_bound_fraction=0.6)] * (phase == "decode")
    header = _result(NEW)["header"] | dict(op="multi_lora_linear")
    text = report.tables("multi_lora_linear", [{"header": header, "rows": rows}])
    alone = " 5.000 | 60% |" if phase == "decode" else ""
    assert f"| 0.50 | 0.400 flops | 80%, 10% |{alone}\n" in text
    rows = [{k: v for k, v in row.items() if k != "floor_by"} for row in rows]
    assert FLOOR not in report.tables("multi_lora_linear", [{"header": header, "rows": rows}])


def test_methods_old_and_new_in_one_table():
    common = dict(method="LoRA", beside="peft", speed_up=2.0)
    rows = [_row(name, NEW, **common) for name in ("library", "peftkern")]
    before = [row | common for row in _result(OLD, N=128)["rows"]]
    for row in before:
        row["N"] = 128
    text = "\n".join(method_times.markdown(rows + before, "fp32"))
    assert f" | {SHARES} |\n" in text and "| 1.0 | 80%, 10% |" in text and "| 1.0 | -, 10% |" in text
    assert SHARES not in "\n".join(method_times.markdown(before, "fp32"))
    # What acts in the residual stream has none.
    none = rows[1] | dict.fromkeys(NEW)
    assert "| -, - |" in "\n".join(method_times.markdown([rows[0], none], "fp32"))


def test_a_bottleneck():
    rows = [_row("base", NEW, adapter_dtype=None), _row("eager", NEW), _row("peftkern", NEW)]
    assert "| 1.0 | 0.400 flops | 80%, 10% |" in "\n".join(bottleneck.markdown(rows, "fp32"))

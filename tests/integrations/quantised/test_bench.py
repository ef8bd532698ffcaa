"""``bench --methods`` over layers of bitsandbytes: the check of results before they are timed, and the rows of a whole model."""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch

from peftkern.bases.base import base_of
from peftkern.benchmarks import bench as command
from peftkern.benchmarks import methods
from peftkern.benchmarks.core.presets import Choice
from peftkern.benchmarks.subjects import layer, llama, quantised
from peftkern.benchmarks.tables import method_times

LLAMAS = [f"LoRA over {form} in Llama" for form in llama.TIMED]
NAMES = [*(f"LoRA over {form}" for form in quantised.KINDS), *LLAMAS]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_timed_computes_what_the_library_does(name):
    for bench, choice in methods.benches([name], Choice(dtypes=["fp32", "bf16"], shapes=[(512, 768, 768)])):
        cases = bench.cases("quick", "cpu", choice)
        assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16}
        for case in cases:
            assert bench.gate(case) is None, case


@pytest.mark.parametrize("name", ["LoRA over int8", "LoRA over W8A8", *LLAMAS])
def test_other_adapters_are_not_timed(name, monkeypatch):
    def other(stock, **options):
        ours, names = accelerated(stock, **options)
        with torch.no_grad():
            next(p for name, p in ours.named_parameters() if "lora_B" in name)[0] += 0.1
        return ours, names

    accelerated = llama.accelerated
    for module in (llama, layer):
        monkeypatch.setattr(module, "accelerated", other)
    for bench, choice in methods.benches([name], Choice(shapes=[(512, 768, 768)])):
        for case in bench.cases("quick", "cpu", choice):
            assert bench.gate(case).startswith("computes something else")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_products_of_integers_err_as_much_as_they_say(dtype, monkeypatch):
    ((bench, choice),) = methods.benches(["LoRA over W8A8"], Choice(dtypes=[dtype], shapes=[(512, 768, 768)]))
    (case,) = bench.cases("quick", "cpu", choice)
    others = {"peftkern_int8", "peftkern_dense"}
    assert others < set(bench.plan(case, "quick")) and others < bench.providers.keys()
    assert all(bench.check(provider, case) is None for provider in bench.providers.values())
    # Products with the weight in 8 bits alone err less, so they are not timed in their place.
    weight_only = functools.partial(layer.accelerated, compute=None)
    monkeypatch.setattr(layer, "accelerated", lambda *args, compute, **options: weight_only(*args, **options))
    assert re.fullmatch(r"computes something else \(y: relative error .*, from 3.0e-03 to 1.1e-02\)", bench.gate(case))


def test_nothing_else_may_err_more():
    for form in quantised.KINDS:
        (subject,) = quantised.subjects(form)
        assert set(subject.bounds) == ({"y", "dx"} if form == "W8A8" else set())
        assert all(not getattr(other, "bounds", None) for other in subject.others.values())


@pytest.mark.parametrize("form", quantised.KINDS)
def test_bytes_are_those_of_codes(form):
    ((bench, choice),) = methods.benches([f"LoRA over {form}"], Choice(dtypes=["bf16"], shapes=[(1, 4096, 4096)]))
    (case,) = bench.cases("quick", "cpu", choice)
    codes = base_of(quantised.in_codes(torch.nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16), form))
    W = sum(t.nbytes for t in codes.tensors)
    for passes, which in ((1, "fwd"), (2, "fwd_bwd")):
        ours, dense, base = (bench.floor_of(name, case, which) for name in ("peftkern", "peftkern_dense", "base"))
        assert ours.base_bytes == pytest.approx(passes * (W + 2 * 2 * 4096), rel=0.01)
        assert dense == base and base.base_bytes == passes * 2 * (4096**2 + 2 * 4096)


def timed(tmp_path, *names: str) -> list[dict]:
    sizes = ["--device", "cpu", "--shape", "64,192,192", "--rank", "8", "--memory"]
    sizes += ["--seconds", "0.01", "--repeats", "2", "--limit", "1000"]
    assert command.main(["--methods", *names, *sizes, "--json", str(tmp_path / "r.json")]) == 0
    return json.loads((tmp_path / "r.json").read_text())["rows"]


def test_saved_bytes_leave_codes_and_scales_out(tmp_path):
    names = [f"LoRA over {form}" for form in quantised.KINDS]
    found = timed(tmp_path, *names)
    rows = {(r["method"], r["provider"]): r["saved_bytes"] for r in found if r["pass"] == "fwd_bwd"}
    x, u = 64 * 192 * 4, 64 * 8 * 4
    for name in names:
        assert rows[name, "peftkern"] == rows[name, "peftkern_dense"] == x + u <= rows[name, "library"], name
    for table in method_times.tables(found):
        firsts = [str(row[0]).strip() for row in table.rows]
        assert firsts.count("peftkern, dense") == len(names) and "peftkern, int8" in firsts


def test_a_whole_model(tmp_path):
    rows = {(r["provider"], r["pass"]): r for r in timed(tmp_path, *LLAMAS)}
    base, theirs, ours = (rows[name, "fwd_bwd"] for name in ("base", "library", "peftkern"))
    assert ours["speed_up"] == pytest.approx(theirs["median_ms"] / ours["median_ms"], rel=1e-3)
    assert (ours["op"], ours["beside"], ours["method"]) == ("lora_linear", "bitsandbytes", LLAMAS[0])
    # Three blocks of seven layers, whose x A^T is kept in fp32: the adapters act.
    assert min(row["saved_bytes"] for row in (theirs, ours)) >= base["saved_bytes"] + 3 * 7 * 64 * 8 * 4

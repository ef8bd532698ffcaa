"""``bench --methods``: every method of the registry that has a layer to time, from the command line to JSON, table, plot and
document."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from peftkern.benchmarks import bench as command
from peftkern.benchmarks import methods, report
from peftkern.benchmarks.core.presets import Choice
from peftkern.benchmarks.measure.probe import TINY as TINY_LAYER
from peftkern.benchmarks.subjects import stream
from peftkern.benchmarks.tables import method_times
from peftkern.methods import METHODS, STREAM
from peftkern.testing.residual import EXAMPLES

pytest.importorskip("peft", reason="HF PEFT is not installed")
M, K, N, R = 24, 40, 32, 4
TINY = ["--device", "cpu", "--shape", f"{M},{K},{N}", "--seconds", "0.01", "--repeats", "5"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("methods")
    argv = ["--methods", "LoRA", *TINY, "--rank", str(R), "--dropout", "0", "0.1", "--dtype", "fp32", "bf16"]
    assert command.main([*argv, "--json", str(folder / "r.json"), "--plot", str(folder)]) == 0
    assert sorted(p.name for p in folder.glob("*.png")) == ["methods-bf16.png", "methods-fp32.png"]
    return folder, json.loads((folder / "r.json").read_text())


def test_rows(result):
    _, result = result
    assert result["header"]["op"] == "methods"
    for which in ("fwd", "fwd_bwd"):
        for dropout in (0.0, 0.1):
            for dtype in ("fp32", "bf16"):
                row = {
                    r["provider"]: r for r in result["rows"]
                    if (r["dtype"], r["pass"], r["dropout"]) == (dtype, which, dropout)
                }  # fmt: skip
                assert row.keys() == {"library", "peftkern"}
                ours, theirs = row["peftkern"], row["library"]
                assert (ours["op"], ours["method"], ours["R"]) == ("lora_linear", "LoRA", R)
                assert ours["skipped"] is None and ours["ratio_to_base"] > 0 and theirs["speed_up"] is None
                assert ours["speed_up"] == pytest.approx(theirs["median_ms"] / ours["median_ms"], rel=1e-3)
                # What the frozen layer must do, the method's own work apart.
                for each in (ours, theirs):
                    peak = result["header"]["fma_gflop_per_s"][dtype] * 1e9
                    least = 2 * (1 if which == "fwd" else 2) * M * K * N / peak
                    share = pytest.approx(1e3 * least / each["median_ms"], rel=0.01, abs=2e-4)
                    assert each["flops_bound_fraction"] == share and each["bytes_bound_fraction"] > 0


def test_saved_bytes_leave_parameters_out(result):
    _, result = result
    saved = {
        (r["provider"], r["dropout"]): r["saved_bytes"] for r in result["rows"]
        if r["pass"] == "fwd_bwd" and r["dtype"] == "fp32"
    }  # fmt: skip
    assert saved["base", None] == 0
    assert saved["library", 0.0] == saved["peftkern", 0.0] == 4 * M * (K + R)
    # The mask and the input without what it drops.
    assert saved["library", 0.1] > 4 * M * 2 * K and saved["peftkern", 0.1] <= 4 * M * (K + R) + 64


def test_document(result, tmp_path):
    folder, _ = result
    document = tmp_path / "README.md"
    document.write_text("<!-- benchmarks:methods -->\n<!-- /benchmarks:methods -->\n")
    assert report.main(["--readme", str(document), "--results", str(folder)]) == 0
    lines = document.read_text().splitlines()
    own = [line for line in lines if line.startswith(f"| LoRA | {M}x{K}x{N} | {R} | 0")]
    assert len(own) == 4 and all(" | PEFT | " in line for line in own)
    assert "fp32, forward + backward: time over the frozen linear" in lines
    assert all(re.search(r" \| \d+%, \d+% \|$", line) for line in own)


def test_results_of_a_machine_are_one_table(result):
    _, result = result
    later = json.loads(json.dumps(result))
    later["header"] |= {"date": "9999-01-01T00:00:00", "commit": "f" * 40}
    later["rows"] = [
        row | {"method": name, "median_ms": 7.0, "dtype": "fp32"} for row in later["rows"] for name in ("(IA)^3", "LoRA")
        if row["dtype"] == "fp32"
    ]  # fmt: skip
    other = json.loads(json.dumps(result))
    other["header"]["device"] = "another one"
    # Of the same name, but another CPU model.
    namesake = json.loads(json.dumps(result))
    namesake["header"]["cpu"]["model_id"] = ["x", 1, 2]
    assert [len(own) for own in method_times.machines([result, other, later, namesake])] == [2, 1, 1]
    assert "(family 1, model 2, " in report.tables("methods", [namesake])
    rows = method_times.newest([later, result])
    # In the registry's order; of a block measured twice the later one, of others what there is.
    assert list(dict.fromkeys(row["method"] for row in rows)) == ["LoRA", "(IA)^3"]
    assert {row["median_ms"] == 7.0 for row in rows if row["dtype"] == "fp32"} == {True}
    assert {row["median_ms"] == 7.0 for row in rows if row["dtype"] == "bf16"} == {False}
    text = report.tables("methods", [result, later])
    assert text.count("**") - text.count("**peftkern**") * 2 == 2 and " to 9999-01-01, commits " in text


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Rows of methods on other kinds of layers, and of those whose tensors are sparse."""
    file = tmp_path_factory.mktemp("others") / "r.json"
    names = [name for name, method in METHODS.items() if method.of and method.op != "lora_linear"]
    argv = ["--methods", *names, "LoRA of experts", "SHiRA", "FRoD", *TINY, "--rank", str(R), "--dtype", "fp32"]
    assert command.main([*argv, "--json", str(file)]) == 0
    return json.loads(file.read_text())["rows"]


def test_layers_of_other_kinds(others):
    found = {}
    for row in others:
        assert row["skipped"] is None
        found.setdefault(row["method"], {})[row["provider"], row["pass"]] = row
    experts = [f"LoRA of experts, {E}, {code}" for E in (8, 64) for code in ("grouped_mm", "eager")]
    embeddings = ["LoRA of embeddings", "DoRA of embeddings"]
    convolutions = [f"{name} of convolutions, {side}" for name in ("LoRA", "DoRA") for side in ("1x1", "3x3")]
    assert set(found) == {*convolutions, *embeddings, *experts, "SHiRA", "FRoD"}
    for name, rows in found.items():
        # A frozen embedding has no backward pass.
        passes = ("fwd",) if name in embeddings else ("fwd", "fwd_bwd")
        assert {which for provider, which in rows if provider == "base"} == set(passes)
        for which in ("fwd", "fwd_bwd"):
            ours, theirs = rows["peftkern", which], rows["library", which]
            assert ours["speed_up"] == pytest.approx(theirs["median_ms"] / ours["median_ms"], rel=1e-3)
            assert (ours["ratio_to_base"] is None) == (which not in passes)
    # Of sparse tensors both parts count: x, the whole weight, and the numbers with their places.
    n = R * (K + N)
    assert found["SHiRA"]["library", "fwd_bwd"]["saved_bytes"] == 4 * (M * K + N * K) + (8 * 2 + 4) * n
    assert found["LoRA of convolutions, 3x3"]["library", "fwd_bwd"]["saved_bytes"] == 4 * M * (K + R)


TIMED = [name for name, method in METHODS.items() if method.layer or method.build]


@pytest.mark.parametrize("name", TIMED)
def test_a_method_has_layers_that_compute_what_the_library_does(name):
    for bench, choice in methods.benches([name], Choice(dtypes=["fp32", "bf16"])):
        cases = {case.dtype: case for case in bench.cases("quick", "cpu", choice)}
        assert len(cases) == 2
        for case in cases.values():
            assert case.adapter_dtype == torch.float32 and case.R == METHODS[name].rank
            assert bench.gate(case) is None
        # What tells whether a dtype is slow is timed on a layer that is smaller than some ranks.
        tiny = dataclasses.replace(case, **dict(zip("MKN", TINY_LAYER)), R=min(case.R, 16))
        step = bench.providers[methods.LIBRARY].build(tiny, bench.data(tiny, 1))
        assert step.forward(0).shape == step.dy[0].shape


def test_every_entry_of_the_residual_stream_is_timed():
    assert stream.TIMED.keys() == STREAM.keys()
    for name, forms in stream.TIMED.items():
        assert forms.keys() <= EXAMPLES[name].keys()
    gelu = stream.TIMED["bottleneck adapter"]["seq_bn, gelu"]
    assert gelu == ((1024, 768, 48), (2048, 1024, 64), (2048, 4096, 256))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Rows of the residual stream without the libraries, one entry in bf16 as well."""
    file = tmp_path_factory.mktemp("alone") / "r.json"
    tiny = ["--device", "cpu", "--shape", "24,32,32", "--seconds", "0.01", "--repeats", "5", "--rank", "4"]
    found = []
    for names, dtype in ((list(stream.TIMED), "fp32"), (["bottleneck adapter"], "bf16")):
        assert command.main(["--methods", *names, *tiny, "--dtype", dtype, "--json", str(file)]) == 0
        found += json.loads(file.read_text())["rows"]
    return found


def test_rows_without_a_layer(alone):
    names = {f"{name}, {form}": STREAM[name].op for name, forms in stream.TIMED.items() for form in forms}
    assert {(row["method"], row["op"]) for row in alone} == set(names.items())
    for row in alone:
        assert row["skipped"] is None and row["ratio_to_base"] > 0
        if row["provider"] in ("library", "peftkern"):
            assert all(row[field] is None for field in methods.FLOOR_FIELDS) and row["adapter_dtype"] == row["dtype"]
            # The environment of these tests has neither library.
            assert row["beside"] == "torch"
    saved = {r["provider"]: r["saved_bytes"] for r in alone
             if (r["method"], r["dtype"], r["pass"]) == ("bottleneck adapter, double_seq_bn", "fp32", "fwd_bwd")}  # fmt: skip
    assert saved == {"base": 0, "library": 4 * 24 * (32 + 2 * 4), "peftkern": 4 * 24 * (32 + 4)}
    table = "\n".join(method_times.markdown([row for row in alone if row["dtype"] == "fp32"], "fp32"))
    assert "| LoReFT, pyreft | 24x32x32 | 4 | 0 | torch's steps | " in table


# tests/integrations/adapters and tests/integrations/quantised have them.
MODELS = {
    "bottleneck adapter in BERT": "adapters is not installed (make adapters-env)",
    "LoRA over NF4 in Llama": "bitsandbytes is not installed (make quantised-env)",
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_wants_its_library(name, tmp_path):
    file = tmp_path / "r.json"
    sizes = ["--device", "cpu", "--shape", "24,192,192", "--seconds", "0.01", "--repeats", "2", "--rank", "4"]
    assert command.main(["--methods", name, *sizes, "--json", str(file)]) == 0
    for row in json.loads(file.read_text())["rows"]:
        assert (row["skipped"] is None) == (row["provider"] == "base")
        assert row["skipped"] in (None, f"not here: {MODELS[name]}")


@pytest.mark.parametrize("name", stream.TIMED)
def test_a_method_of_the_residual_stream_computes_what_torchs_steps_do(name):
    for bench, choice in methods.benches([name], Choice(dtypes=["fp32", "bf16"])):
        for case in bench.cases("quick", "cpu", choice):
            assert case.adapter_dtype == case.dtype and case.K == case.N
            assert bench.gate(case) is None


def test_only_what_a_method_has_is_varied():
    asked = Choice(ranks=[8], dropouts=[0.0, 0.1])
    names = ["LoRA", "(IA)^3", "PVeRA", "Arrow", "ConsReFT", "AdapterFusion"]
    has = {bench.name: (choice.ranks, choice.dropouts) for bench, choice in methods.benches(names, asked)}
    # PVeRA is timed in evaluation, and Arrow with dropout is the library's.
    assert has == {
        "LoRA": ([8], [0.0, 0.1]), "(IA)^3": (None, None), "PVeRA": ([8], None), "Arrow": ([8], None),
        "ConsReFT, pyreft": ([8], None), "AdapterFusion, dynamic": (None, None),
    }  # fmt: skip


def test_an_unknown_method_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--methods", "no such", *TINY])
    assert "no method to time is called no such; there are " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--methods", "LoRA", *TINY, "--provider", "peftkern"])
    assert "mean nothing to --methods" in capsys.readouterr().err

"""The committed results: of real machines, a file for each CPU model and what it lets programs use."""

from __future__ import annotations

import json

import pytest

from peftkern.benchmarks import report
from peftkern.benchmarks.core import machine
from peftkern.benchmarks.tables.summary import MACHINES


def _file(folder, **settings):
    header = dict(op="lora_linear", settings={"PEFTKERN_CPU_ISA": "auto", "OMP_NUM_THREADS": "2"} | settings)
    (folder / "r.json").write_text(json.dumps({"header": header, "rows": []}))
    return folder


def test_a_result_that_was_held_back_is_refused(tmp_path):
    assert len(report.load(_file(tmp_path))) == 1
    for name, value in (("PEFTKERN_CPU_ISA", "avx2"), ("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2")):
        with pytest.raises(
            ValueError, match=f"r.json: instruction sets are held back by {name}={value}; documents show"
        ):
            report.load(_file(tmp_path, **{name: value}))


def test_the_header_tells_what_holds_back(monkeypatch):
    assert machine.held_back(machine.header("cpu", 1e10)) is None
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert (
        machine.held_back(machine.header("cpu", 1e10)) == "instruction sets are held back by ATEN_CPU_CAPABILITY=avx2"
    )


def test_a_file_is_of_one_cpu_model_and_named_after_it():
    named: dict[str, set] = {}
    for result in report.load():
        header = result["header"]
        stem, _, model = header["file"].rpartition("-cpu-")
        if header["gpu"]:
            continue
        assert stem.startswith(header["op"]) and model in MACHINES, header["file"]
        # Results from before the model was told have none.
        if header["cpu"].get("model_id"):
            named.setdefault(model, set()).add((*header["cpu"]["model_id"], header["cpu"]["torch_isa"]))
    assert named and all(len(machines) == 1 for machines in named.values()), named
    assert len({found for machines in named.values() for found in machines}) == len(named)

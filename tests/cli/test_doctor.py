"""doctor: complete, honest about what is missing, and JSON that parses."""

from __future__ import annotations

import json

import pytest
import torch

from peftkern import doctor
from peftkern.dispatch.choose import BACKENDS, load
from peftkern.settings import current


def test_text_has_every_section(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    for title in ("versions", "processor", "GPU", "build", "back ends", "base product on CPU", "settings"):
        assert title in out
    assert torch.__version__ in out


def test_json_to_terminal_and_file(capsys, tmp_path):
    assert doctor.main(["--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert doctor.main(["--json", str(tmp_path / "d.json")]) == 0
    written = json.loads((tmp_path / "d.json").read_text())
    assert printed["versions"] == written["versions"]
    assert printed["threads"] == torch.get_num_threads()
    assert set(printed["backends"]) == {"reference", *BACKENDS}


def test_unusable_back_ends_have_a_reason():
    for name, found in doctor.backends().items():
        assert found["usable"] == (found["reason"] is None), name


def test_a_back_end_that_says_no_is_reported(monkeypatch):
    module = load("triton")
    monkeypatch.setattr(module, "unavailable", lambda now: "for this test")
    assert doctor.backends()["triton"] == {"usable": False, "reason": "for this test"}


def test_settings_in_force(monkeypatch):
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    found = doctor.settings_in_use()
    assert found["PEFTKERN_BACKEND"] == "reference" and found["OMP_NUM_THREADS"] == "2"


def test_absent_packages_are_none(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package-here"))
    found = doctor.versions()
    assert found["no-such-package-here"] is None
    assert "not installed" in doctor.text(doctor.report() | {"versions": found})


def test_base_products_cover_dtypes_and_passes():
    found = doctor.base_products()
    if not load("cpu").unavailable(current()):
        assert set(found) == {"float32", "bfloat16", "float16"}
        assert all(set(passes) == {"forward", "input gradient"} for passes in found.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_is_named():
    assert doctor.gpu()["arch"].startswith("sm_")


def test_base_products_follow_the_settings(monkeypatch):
    if load("cpu").unavailable(current()):
        pytest.skip("the C++ extension is not built")
    found = {}
    for base in ("vendor", "panels"):
        monkeypatch.setenv("PEFTKERN_CPU_BASE", base)
        found[base] = doctor.base_products()["bfloat16"]["forward"]
    assert "torch" in found["vendor"] and "peftkern" in found["panels"]


def test_without_the_cpu_back_end(monkeypatch):
    monkeypatch.setattr(load("cpu"), "unavailable", lambda now: "for this test")
    assert doctor.base_products() == {}
    assert "reference" in doctor.text(doctor.report())


def run(capsys, *words):
    assert doctor.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_call_is_explained_pass_by_pass(capsys, monkeypatch):
    """What it says is what a call gets: the reference for fp64, and the named back end, or why it cannot."""
    size = ("--op", "lora_linear", "--M", "8", "--K", "64", "--N", "48", "--R", "4")
    forward, *backward = run(capsys, *size, "--dtype", "fp64")
    assert forward["op"] == "lora_linear_fwd" and "M=8 N=48 K=64 R=4" in forward["problem"] and backward
    for each in (forward, *backward):
        assert (each["backend"] == "reference" and "float64" in each["declined"]["cpu"]) or load("cpu").unavailable(
            current()
        )
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")
    assert {each["why"] for each in run(capsys, *size)} == {"PEFTKERN_BACKEND=reference"}
    monkeypatch.setenv("PEFTKERN_BACKEND", "cuda")
    assert all(each["backend"] is None and "cannot take" in each["why"] for each in run(capsys, *size))
    assert doctor.main([*size]) == 0
    assert "nobody: PEFTKERN_BACKEND=cuda cannot take lora_linear_fwd" in capsys.readouterr().out


@pytest.mark.skipif(load("cpu").unavailable(current()) is not None, reason="the C++ extension is not built")
def test_the_base_product_of_a_call_is_explained(capsys, tmp_path):
    """The kind, its blocks and the row of the table that it came from."""
    from peftkern.backends.cpu import native
    from peftkern.dispatch import cpu_table
    from peftkern.settings import using

    model = cpu_table.CpuModel(*native.model())
    if not model.vendor:
        pytest.skip("this CPU does not say which model it is")
    native.use_isa("auto")
    row = {"dtype": "fp32", "pass": "forward", "D": 48, "C": 64, "M": [8], "us": {"vendor": [9.0], "panels": [5.0]}}
    cpu = {"vendor": model.vendor, "family": model.family, "models": [model.model] * 2}
    meta = {"cpu": cpu, "level": native.level()._asdict(), "threads": 1, "date": "2026-12-01"}
    (tmp_path / cpu_table.file_name(model, native.level().isa)).write_text(
        json.dumps({"schema": 1, "meta": meta, "rows": [row]})
    )
    size = ("--op", "lora_linear", "--M", "10", "--K", "64", "--N", "48")
    with using(tables=(str(tmp_path),)):
        forward, *backward = run(capsys, *size)
        assert forward["base_product"] == "peftkern, fp32 panels" and "10 x 64" in forward["blocks"]
        assert cpu_table.file_name(model, native.level().isa) in forward["why"] and "D=48 C=64 M=8" in forward["why"]
        assert doctor.main([*size, "--dropout"]) == 0
        assert "base product peftkern, fp32 panels, 10 x 64" in capsys.readouterr().out
    assert any(each.get("base_product") == "torch's product" for each in backward)

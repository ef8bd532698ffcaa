"""doctor: complete, honest about what is missing, and JSON that parses."""

from __future__ import annotations

import json

import pytest
import torch

from peftkern import doctor
from peftkern.dispatch import registry as dispatch


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
    assert set(printed["backends"]) == {"reference", *dispatch.BACKENDS}


def test_unusable_back_ends_have_a_reason():
    for name, found in doctor.backends().items():
        assert found["usable"] == (found["reason"] is None), name


def test_a_back_end_that_says_no_is_reported(monkeypatch):
    module = dispatch.load("triton")
    monkeypatch.setattr(module, "unavailable", lambda: "for this test")
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
    if not dispatch.load("cpu").unavailable():
        assert set(found) == {"float32", "bfloat16", "float16"}
        assert all(set(passes) == {"forward", "input gradient"} for passes in found.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_is_named():
    assert doctor.gpu()["arch"].startswith("sm_")


def test_base_products_follow_the_settings(monkeypatch):
    if dispatch.load("cpu").unavailable():
        pytest.skip("the C++ extension is not built")
    found = {}
    for base in ("vendor", "panels"):
        monkeypatch.setenv("PEFTKERN_CPU_BASE", base)
        found[base] = doctor.base_products()["bfloat16"]["forward"]
    assert "torch" in found["vendor"] and "peftkern" in found["panels"]


def test_without_the_cpu_back_end(monkeypatch):
    monkeypatch.setattr(dispatch.load("cpu"), "unavailable", lambda: "for this test")
    assert doctor.base_products() == {}
    assert "reference" in doctor.text(doctor.report())

"""``peftkern verify --static`` says what it finds and fails where a bound is broken."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest

from peftkern.verify import main as verify
from peftkern.verify.static import cubins, cuda, cuda_launches, nvcc, records

SCALE = Path(__file__).with_name("kernels") / "scale.cu"
pytestmark = [
    pytest.mark.skipif(cubins.unavailable() is not None, reason=str(cubins.unavailable())),
    pytest.mark.xdist_group("static-cuda"),
]
needs_nvcc = pytest.mark.skipif(nvcc.nvcc() is None, reason="nvcc is not installed")


@pytest.fixture
def bounds(tmp_path, monkeypatch) -> Path:
    """A folder of bounds of its own."""
    monkeypatch.setattr(records, "FOLDER", tmp_path / "bounds")
    return tmp_path / "bounds"


@pytest.fixture
def small(bounds, monkeypatch):
    """One small kernel in place of all; a call sets the macros that it is built with."""
    if nvcc.nvcc() is None:
        pytest.skip("nvcc is not installed")

    def build(*flags: str) -> None:
        def cubin(arch: str) -> bytes:
            return nvcc.build(SCALE, arch, *flags).cubin

        origin = cuda.Origin("scale.cu", tuple(functools.partial(cubin, a) for a in ("sm_80", "sm_90")))
        monkeypatch.setattr(cuda, "origin", lambda: origin)

    def record() -> int:
        records.write(cuda_launches.NAME, {"scale_kernel": {"threads": 128, "shared": 0}})
        return 0

    monkeypatch.setattr(cuda_launches, "record", record)
    build()
    return build


def audit(*arguments: str) -> int:
    return verify.main(["--static", *arguments])


def test_records_passes_and_fails(small, bounds, tmp_path, capsys):
    assert audit("--kernels", "cuda") == 1
    assert "no bounds recorded" in capsys.readouterr().out
    assert audit("--kernels", "cuda", "--record") == 0
    file = tmp_path / "out/static.json"
    assert audit("--kernels", "cuda", "--json", str(file)) == 0
    out = capsys.readouterr().out
    assert "2 compiled kernels, 0 failures" in out and "128:1" in out and "64/64" in out
    written = json.loads(file.read_text())
    assert [(r["key"], r["problems"]) for r in written["rows"]] == [
        ("sm_80 scale_kernel", []),
        ("sm_90 scale_kernel", []),
    ]
    assert all(r["warps"] == 64 and r["mix"] == {"LDG.128": 1, "STG.128": 1} for r in written["rows"])

    small("-DNARROW")
    assert audit("--kernels", "cuda", "--json", str(file)) == 1
    out = capsys.readouterr().out
    assert out.count("0 LDG.128, 1 recorded") == 2 and "FAILED sm_80" in out and "2 failures" in out
    assert all(r["problems"] for r in json.loads(file.read_text())["rows"])


def test_a_tightened_bound_fails(small, bounds, capsys):
    assert audit("--kernels", "cuda", "--record") == 0
    content = records.read(cuda.BOUNDS)
    for by_compiler in content.values():
        for bound in by_compiler.values():
            bound["registers"] = 8
    records.write(cuda.BOUNDS, content)
    assert audit("--kernels", "cuda") == 1
    assert "registers, 8 recorded" in capsys.readouterr().out
    assert audit("--kernels", "cuda", "--arch", "120") == 1, "nothing was audited"


def test_a_bound_without_a_kernel_fails(small, bounds, capsys):
    assert audit("--kernels", "cuda", "--record") == 0
    content = records.read(cuda.BOUNDS)
    records.write(cuda.BOUNDS, content | {"sm_80 old_kernel": {}, "sm_120 other_kernel": {}})
    assert audit("--kernels", "cuda") == 1
    out = capsys.readouterr().out
    assert "old_kernel: bounds of a kernel that is gone" in out and "other_kernel" not in out


def test_recording_keeps_what_other_compilers_made(small, bounds):
    assert audit("--kernels", "cuda", "--record") == 0
    content = records.read(cuda.BOUNDS)
    (mine,) = content["sm_80 scale_kernel"]
    other = {"registers": 99, "shared": 0, "warps": 1, "mix": {}}
    records.write(cuda.BOUNDS, {"sm_80 scale_kernel": {"nvcc 1.0": other}, "sm_80 old_kernel": {"nvcc 1.0": other}})
    assert audit("--kernels", "cuda", "--record") == 0
    content = records.read(cuda.BOUNDS)
    assert content.keys() == {"sm_80 scale_kernel", "sm_90 scale_kernel"}
    assert content["sm_80 scale_kernel"].keys() == {"nvcc 1.0", mine}


def test_what_cannot_be_audited_is_said(small, monkeypatch, capsys):
    monkeypatch.setattr(cuda, "origin", lambda: "peftkern._C was built without CUDA, and there is no nvcc")
    assert audit("--kernels", "cuda") == 1
    assert "cuda: not audited: peftkern._C was built without CUDA" in capsys.readouterr().out
    monkeypatch.setattr(cubins, "checkout", lambda: None)
    assert audit("--record") == 2


def test_triton_kernels(bounds, monkeypatch, capsys):
    """One kernel of one op: recorded, within its bounds, and not within narrower ones."""
    pytest.importorskip("triton", reason="Triton is an optional dependency")
    from peftkern.verify.static import audit as command
    from peftkern.verify.static.launches import lora_linear

    if reason := command.triton_unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(command, "TRITON", ("lora_linear",))
    monkeypatch.setattr(lora_linear, "MORE", ())
    monkeypatch.setattr(lora_linear, "STANDARD", [lora_linear.Case(90)])
    launch = next(item for item in lora_linear.capture(lora_linear.Case(90)) if item.name == "expand_kernel")
    monkeypatch.setattr(lora_linear, "capture", lambda case: [launch])
    assert audit("--kernels", "triton") == 1
    assert audit("--kernels", "triton", "--record") == 0
    capsys.readouterr()
    assert audit("--kernels", "triton") == 0
    out = capsys.readouterr().out
    assert "expand_kernel" in out and "HGMMA" in out and "UTMALDG" in out and ", 0 failures" in out
    content = records.read(lora_linear.BOUNDS)
    for by_compiler in content.values():
        for bound in by_compiler.values():
            bound["shared"] -= 1
    records.write(lora_linear.BOUNDS, content)
    assert audit("--kernels", "triton") == 1
    assert "bytes of shared memory" in capsys.readouterr().out


def test_an_extension_that_is_out_of_date_is_not_audited(tmp_path, monkeypatch):
    library = tmp_path / "_C.so"
    library.write_bytes(b"")
    assert cuda.stale(library) is None
    os.utime(library, (0, 0))
    assert cuda.stale(library).suffix in (".cu", ".h")


def test_a_launch_that_asks_for_more_than_recorded_fails(bounds, monkeypatch):
    monkeypatch.delenv(cuda_launches.SETTING, raising=False)
    launched = {
        "sgmv_kernel<bf16, float>": {"threads": 256, "shared": 1000},
        "gemm_kernel": {"threads": 64, "shared": 1},
    }
    cuda_launches.settle(launched)  # nothing is recorded yet
    monkeypatch.setenv(cuda_launches.SETTING, "1")
    cuda_launches.settle(launched)
    assert cuda_launches.recorded() == {"sgmv_kernel<bf16, float>": {"threads": 256, "shared": 1000}}
    monkeypatch.delenv(cuda_launches.SETTING)
    cuda_launches.settle(launched)
    launched["sgmv_kernel<bf16, float>"]["shared"] = 1001
    with pytest.raises(AssertionError, match="1001 shared, 1000 recorded"):
        cuda_launches.settle(launched)

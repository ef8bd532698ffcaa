"""``peftkern verify --static`` says what it finds and fails where a bound is broken."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest

from peftkern.benchmarks import static_bounds, static_cubin, static_cuda, static_launches, static_nvcc, verify

SCALE = Path(__file__).with_name("kernels") / "scale.cu"
pytestmark = [
    pytest.mark.skipif(static_cubin.unavailable() is not None, reason=str(static_cubin.unavailable())),
    pytest.mark.xdist_group("static-cuda"),
]
needs_nvcc = pytest.mark.skipif(static_nvcc.nvcc() is None, reason="nvcc is not installed")


@pytest.fixture
def bounds(tmp_path, monkeypatch) -> Path:
    """A folder of bounds of its own."""
    monkeypatch.setattr(static_bounds, "FOLDER", tmp_path / "bounds")
    return tmp_path / "bounds"


@pytest.fixture
def small(bounds, monkeypatch):
    """One small kernel in place of all; a call sets the macros that it is built with."""
    if static_nvcc.nvcc() is None:
        pytest.skip("nvcc is not installed")

    def build(*flags: str) -> None:
        def cubin(arch: str) -> bytes:
            return static_nvcc.build(SCALE, arch, *flags).cubin

        origin = static_cuda.Origin("scale.cu", tuple(functools.partial(cubin, a) for a in ("sm_80", "sm_90")))
        monkeypatch.setattr(static_cuda, "origin", lambda: origin)

    def record() -> int:
        static_bounds.write(static_launches.NAME, {"scale_kernel": {"threads": 128, "shared": 0}})
        return 0

    monkeypatch.setattr(static_launches, "record", record)
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
    content = static_bounds.read(static_cuda.BOUNDS)
    for by_compiler in content.values():
        for bound in by_compiler.values():
            bound["registers"] = 8
    static_bounds.write(static_cuda.BOUNDS, content)
    assert audit("--kernels", "cuda") == 1
    assert "registers, 8 recorded" in capsys.readouterr().out
    assert audit("--kernels", "cuda", "--arch", "120") == 1, "nothing was audited"


def test_a_bound_without_a_kernel_fails(small, bounds, capsys):
    assert audit("--kernels", "cuda", "--record") == 0
    content = static_bounds.read(static_cuda.BOUNDS)
    static_bounds.write(static_cuda.BOUNDS, content | {"sm_80 old_kernel": {}, "sm_120 other_kernel": {}})
    assert audit("--kernels", "cuda") == 1
    out = capsys.readouterr().out
    assert "old_kernel: bounds of a kernel that is gone" in out and "other_kernel" not in out


def test_recording_keeps_what_other_compilers_made(small, bounds):
    assert audit("--kernels", "cuda", "--record") == 0
    content = static_bounds.read(static_cuda.BOUNDS)
    (mine,) = content["sm_80 scale_kernel"]
    other = {"registers": 99, "shared": 0, "warps": 1, "mix": {}}
    static_bounds.write(
        static_cuda.BOUNDS, {"sm_80 scale_kernel": {"nvcc 1.0": other}, "sm_80 old_kernel": {"nvcc 1.0": other}}
    )
    assert audit("--kernels", "cuda", "--record") == 0
    content = static_bounds.read(static_cuda.BOUNDS)
    assert content.keys() == {"sm_80 scale_kernel", "sm_90 scale_kernel"}
    assert content["sm_80 scale_kernel"].keys() == {"nvcc 1.0", mine}


def test_what_cannot_be_audited_is_said(small, monkeypatch, capsys):
    monkeypatch.setattr(static_cuda, "origin", lambda: "peftkern._C was built without CUDA, and there is no nvcc")
    assert audit("--kernels", "cuda") == 1
    assert "cuda: not audited: peftkern._C was built without CUDA" in capsys.readouterr().out
    monkeypatch.setattr(static_cubin, "checkout", lambda: None)
    assert audit("--record") == 2


def test_triton_kernels(bounds, monkeypatch, capsys):
    """One case of one op: recorded, within its bounds, and not within narrower ones."""
    pytest.importorskip("triton", reason="Triton is an optional dependency")
    from peftkern.benchmarks import static_audit, static_lora_linear

    if reason := static_audit.triton_unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(static_audit, "TRITON", ("static_lora_linear",))
    monkeypatch.setattr(static_lora_linear, "MORE", ())
    monkeypatch.setattr(static_lora_linear, "STANDARD", [static_lora_linear.Case(90)])
    assert audit("--kernels", "triton") == 1
    assert audit("--kernels", "triton", "--record") == 0
    capsys.readouterr()
    assert audit("--kernels", "triton") == 0
    out = capsys.readouterr().out
    assert "expand_kernel" in out and "HGMMA" in out and "UTMALDG" in out and ", 0 failures" in out
    content = static_bounds.read(static_lora_linear.BOUNDS)
    for by_compiler in content.values():
        for bound in by_compiler.values():
            bound["shared"] -= 1
    static_bounds.write(static_lora_linear.BOUNDS, content)
    assert audit("--kernels", "triton") == 1
    assert "bytes of shared memory" in capsys.readouterr().out


def test_an_extension_that_is_out_of_date_is_not_audited(tmp_path, monkeypatch):
    library = tmp_path / "_C.so"
    library.write_bytes(b"")
    assert static_cuda.stale(library) is None
    os.utime(library, (0, 0))
    assert static_cuda.stale(library).suffix in (".cu", ".h")


def test_a_launch_that_asks_for_more_than_recorded_fails(bounds, monkeypatch):
    monkeypatch.delenv(static_launches.SETTING, raising=False)
    launched = {
        "sgmv_kernel<bf16, float>": {"threads": 256, "shared": 1000},
        "gemm_kernel": {"threads": 64, "shared": 1},
    }
    static_launches.settle(launched)  # nothing is recorded yet
    monkeypatch.setenv(static_launches.SETTING, "1")
    static_launches.settle(launched)
    assert static_launches.recorded() == {"sgmv_kernel<bf16, float>": {"threads": 256, "shared": 1000}}
    monkeypatch.delenv(static_launches.SETTING)
    static_launches.settle(launched)
    launched["sgmv_kernel<bf16, float>"]["shared"] = 1001
    with pytest.raises(AssertionError, match="1001 shared, 1000 recorded"):
        static_launches.settle(launched)

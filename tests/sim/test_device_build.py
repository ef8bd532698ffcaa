"""The device bodies of all wrappers, and every kernel, compile for the architectures that they are for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "tests/sim/kernels"


def architectures(source: Path) -> tuple[str, ...]:
    """What a kernel's file is compiled for, as in CMakeLists.txt: sm_90a alone, or every architecture."""
    if source.stem == "tensor_map":
        return ()
    return ("sm_90a",) if source.stem.endswith("_sm90") else ("sm_80", "sm_90", "sm_100", "sm_120")


CASES = [
    (KERNELS / "instructions_sm80.cu", "sm_80"),
    (KERNELS / "gemm_sm80.cu", "sm_120"),
    (KERNELS / "publish.cu", "sm_80"),
    (KERNELS / "split.cu", "sm_80"),
    (KERNELS / "instructions_sm90.cu", "sm_90a"),
    (KERNELS / "gemm_sm90.cu", "sm_90a"),
    (KERNELS / "clusters.cu", "sm_90a"),
    (ROOT / "csrc/cuda/tensor_map.cu", "sm_90a"),
    *((source, arch) for source in sorted(ROOT.glob("csrc/cuda/*.cu")) for arch in architectures(source)),
]


def nvcc() -> str:
    """The compiler, found as CMakeLists.txt finds it."""
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    if "CUDA_HOME" in os.environ:
        places.insert(1, os.environ["CUDA_HOME"] + "/bin/nvcc")
    for place in filter(None, places):
        if Path(place).is_file():
            return place
    pytest.skip("nvcc is not installed, so device bodies are not compiled")


@pytest.mark.parametrize("source, arch", [pytest.param(*c, id=f"{c[0].stem}-{c[1]}") for c in CASES])
def test_compiles_without_spills(source, arch, tmp_path):
    command = [
        nvcc(), "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Werror", "all-warnings", "-Xptxas", "-v",
        f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include", source, "-o", tmp_path / "out.cubin",
    ]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.cubin").stat().st_size > 0
    spills = {line for line in done.stderr.splitlines() if "spill" in line and "0 bytes spill stores" not in line}
    assert not spills, spills

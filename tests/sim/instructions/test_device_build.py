"""The device bodies of all wrappers compile for the architectures that they are for.

The library's kernels are compiled with the extension. tests/verify/static/test_cuda.py looks at what came of them: products
that ptxas serialised and a setmaxnreg that it ignored show in the machine code.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from peftkern.verify.static import nvcc

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / "tests/sim/kernels"

CASES = [
    (KERNELS / "instructions_sm80.cu", "sm_80"),
    (KERNELS / "gemm_sm80.cu", "sm_120"),
    (KERNELS / "publish.cu", "sm_80"),
    (KERNELS / "split.cu", "sm_80"),
    (KERNELS / "instructions_sm90.cu", "sm_90a"),
    (KERNELS / "gemm_sm90.cu", "sm_90a"),
    (KERNELS / "clusters.cu", "sm_90a"),
    (ROOT / "csrc/cuda/common/tensor_map.cu", "sm_90a"),
]


@pytest.mark.skipif(nvcc.nvcc() is None, reason="nvcc is not installed, so device bodies are not compiled")
@pytest.mark.parametrize("source, arch", [pytest.param(*c, id=f"{c[0].stem}-{c[1]}") for c in CASES])
def test_compiles_without_spills(source, arch):
    built = nvcc.build(source, arch)
    assert len(built.cubin) > 0
    spills = {line for line in built.log.splitlines() if "spill" in line and "0 bytes spill stores" not in line}
    assert not spills, spills

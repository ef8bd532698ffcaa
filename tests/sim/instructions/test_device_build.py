"""The device bodies of all wrappers compile for the architectures that they are for, and their launchers with them.

The library's kernels are compiled with the extension. tests/verify/static/test_cuda.py looks at what came of them: products
that ptxas serialised and a setmaxnreg that it ignored show in the machine code.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from peftkern.verify.static import nvcc

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "gpu"))
import golden_cases
import native

KERNELS = native.KERNELS
pytestmark = pytest.mark.skipif(nvcc.nvcc() is None, reason="nvcc is not installed, so device bodies are not compiled")
# For sm_90a all are compiled, with their launchers, which are the same code for every architecture.
OTHERS = [
    (KERNELS / "instructions_sm80.cu", "sm_80"),
    (KERNELS / "gemm_sm80.cu", "sm_120"),
    (KERNELS / "publish.cu", "sm_80"),
    (KERNELS / "split.cu", "sm_80"),
]


def spills(log: str) -> set[str]:
    """The assembler's lines that speak of any."""
    lines = [line for line in log.splitlines() if "spill" in line]
    assert lines
    return {line for line in lines if "0 bytes spill stores" not in line}


@pytest.mark.parametrize("source, arch", [pytest.param(*c, id=f"{c[0].stem}-{c[1]}") for c in OTHERS])
def test_compiles_without_spills(source, arch):
    built = nvcc.build(source, arch)
    assert len(built.cubin) > 0 and not spills(built.log)


def test_the_launchers_are_built_without_spills_or_warnings():
    library = native.build(native.ROOT / "build/gpu", 90)
    said = library.with_suffix(".log").read_text()
    assert not spills(said) and "warning" not in said
    launchers = ctypes.CDLL(str(library))
    assert all(getattr(launchers, case.launcher) for case in golden_cases.CASES)

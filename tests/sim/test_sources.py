"""No source is left out of a build in silence: CMakeLists.txt, the simulator and nvcc take what is in the folders."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from peftkern.verify.static import nvcc

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
import native

ROOT = Path(__file__).resolve().parents[2]


def names(paths) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def found(folder: str, *suffixes: str) -> list[str]:
    return names(path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)


def test_the_extension_has_every_source():
    listed = re.findall(r"csrc/\S+\.(?:cpp|cu)", (ROOT / "CMakeLists.txt").read_text())
    assert sorted(set(listed)) == found("csrc", ".cpp", ".cu")
    assert len(set(listed)) == 68


def test_the_simulator_has_every_source(compiled):
    kernels = [name for name in found("csrc/cuda", ".cpp", ".cu") if not name.endswith("tensor_map.cu")]
    bindings = [*found("csrc/bindings/cuda", ".cpp"), "csrc/bindings/quantised.cpp", "csrc/bindings/tensors.cpp"]
    own = found("tests/sim", ".cpp", ".cu")
    assert set(names(compiled)) == {*kernels, *own, *bindings}
    assert (len(kernels), len(own), len(bindings), len(compiled)) == (15, 30, 8, 53)


def test_nvcc_gets_every_source():
    assert len(nvcc.sources()) == 13
    assert [len(native.sources(arch)) for arch in (80, 90)] == [5, 10]

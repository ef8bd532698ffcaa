"""The audit of CUDA kernels: those that are built are within bounds, and each way of getting worse is noticed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from peftkern.verify.static import cubins, cuda, nvcc, records

ROOT = Path(__file__).resolve().parents[3]
SCALE = Path(__file__).with_name("kernels") / "scale.cu"
HOPPER = ROOT / "tests/sim/kernels/gemm_sm90.cu"
LAUNCH = {"threads": 128, "shared": 0}

pytestmark = pytest.mark.skipif(cubins.unavailable() is not None, reason=str(cubins.unavailable()))
needs_nvcc = pytest.mark.skipif(nvcc.nvcc() is None, reason="nvcc is not installed")
together = pytest.mark.xdist_group("static-cuda")


@pytest.fixture(scope="module")
def audited() -> list[records.Row]:
    origin = cuda.origin()
    if isinstance(origin, str):
        pytest.skip(origin)
    return cuda.rows(*origin.cubins)


@pytest.fixture
def bounds() -> dict:
    found = records.read(cuda.BOUNDS)
    assert found, "no bounds of CUDA kernels are recorded: peftkern verify --static --kernels cuda --record"
    return found


@together
@pytest.mark.slow(45)
def test_every_kernel_and_launch_is_recorded(audited, bounds):
    missing = {r.key for r in audited if r.key not in bounds} | {r.kernel for r in audited if r.dynamic is None}
    assert not missing, "peftkern verify --static --kernels cuda --record"
    assert not cuda.absent(audited, bounds)


@together
def test_every_kernel_is_within_bounds(audited, bounds):
    found = {r.key: cuda.problems(r, bounds[r.key]) for r in audited if r.key in bounds}
    assert {k: p for k, p in found.items() if p} == {}
    assert found


@together
def test_no_kernel_spills_or_waits_too_often(audited):
    """What needs no record."""
    found = {r.key: records.always(r) + records.hopper(r) for r in audited}
    assert {k: p for k, p in found.items() if p} == {}


@together
def test_a_setmaxnreg_that_is_ignored_is_noticed(audited, bounds):
    """The assembler then leaves it out."""
    hopper = [r for r in audited if r.arch == "sm_90a"]
    assert hopper
    for r in hopper:
        assert r.mix["USETMAXREG"] == 2, r.key
        without = dataclasses.replace(r, mix={kind: n for kind, n in r.mix.items() if kind != "USETMAXREG"})
        assert any("0 USETMAXREG" in p for p in records.broken(without, bounds[r.key])), r.key


def scale(*flags: str, launch: dict[str, int] | None = LAUNCH) -> records.Row:
    """The small kernel as sm_80 gets it, built with some macros."""
    ((kernel,),) = cubins.read(nvcc.build(SCALE, "sm_80", *flags).cubin)
    return cuda.row(kernel, launch)


def problems(row: records.Row) -> str:
    """What is wrong with it, held against what is recorded of the kernel without macros."""
    good = scale()
    return "\n".join(cuda.problems(row, {good.compiler: good.measured()}))


@needs_nvcc
@together
def test_what_was_recorded_passes():
    row = scale()
    assert row.mix == {"LDG.128": 1, "STG.128": 1} and row.threads == 128 and row.shared == 0
    assert row.compiler.startswith("nvcc ") and row.key == "sm_80 scale_kernel"
    assert problems(row) == ""


@needs_nvcc
@together
@pytest.mark.parametrize(
    "flag, message",
    [
        ("-DNARROW", "0 LDG.128, 1 recorded\n4 LDG.32, 0 recorded: accesses have become narrower"),
        ("-DLOCAL_ARRAY", "256 bytes of stack"),
        ("-DLOCAL_ARRAY", r"\d accesses of local memory \(LDL, STL\)"),
        ("-DATOMIC", "1 float atomics"),
        ("-DSHARED", "16384 bytes of shared memory, 0 recorded"),
        ("-DSHARED", r"\d+ warps on a multiprocessor, 64 recorded"),
        ("-DBOUNDS=", "no __launch_bounds__"),
    ],
)
def test_what_is_worse_is_noticed(flag, message):
    found = problems(scale(flag))
    assert re.search(message, found), found


@needs_nvcc
@together
def test_more_registers_than_recorded_are_noticed():
    row = scale()
    bound = row.measured() | {"registers": row.registers - 1}
    assert records.broken(row, {row.compiler: bound}) == [f"{row.registers} registers, {row.registers - 1} recorded"]


@needs_nvcc
@together
def test_launches_are_part_of_it():
    assert "no launch of it is recorded" in problems(scale(launch=None))
    assert "65536 bytes of shared memory, 0 recorded" in problems(scale(launch={"threads": 128, "shared": 65536}))
    assert "its bounds allow 128" in problems(scale(launch={"threads": 256, "shared": 0}))
    assert "no block fits" in problems(scale(launch={"threads": 128, "shared": 200 << 10}))


@needs_nvcc
@together
def test_another_compiler_is_held_to_the_kinds_of_instructions():
    good, narrow = scale(), scale("-DNARROW", "-DSHARED")
    recorded = {"nvcc 1.0": good.measured()}
    assert records.broken(good, recorded) == []
    assert records.broken(narrow, recorded) == ["0 LDG.128, 1 recorded"]
    assert records.broken(good, {}) == ["no bounds recorded: run with --record"]


NO_BUGS = ("float* c, int bug) {\n  unsigned", "float* c, int) {\n  constexpr int bug = kNone;\n  unsigned")


def hopper(tmp_path: Path, *changes: tuple[str, str]) -> records.Row:
    """The simulator's kernel for sm_90a with changes of its text."""
    text = HOPPER.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    source = tmp_path / "gemm_sm90.cu"
    source.write_text(text)
    (tmp_path / "export.h").write_text((HOPPER.parent / "export.h").read_text())
    ((kernel,),) = cubins.read(nvcc.build(source, "sm_90a").cubin)
    return cuda.row(kernel, {"threads": 160, "shared": 40 << 10})


@needs_nvcc
@together
def test_a_loop_of_tile_copies_and_wgmma_passes(tmp_path):
    row = hopper(tmp_path, NO_BUGS)
    assert row.mix["HGMMA"] == 4 and row.mix["UTMALDG"] == 2 and row.arch == "sm_90a"
    (loop,) = row.loops
    assert (loop.products, loop.groups, loop.waits, loop.arrivals, loop.steps) == (4, 1, 1, 1, 1)
    assert records.always(row) + records.hopper(row) == []


SECOND_WAIT = (
    "    if (bug != kNoFence) wgmma_fence();",
    "    mbarrier_wait(full + 8 * s, parity);\n    wgmma_fence();",
)
NO_TILES = [
    ("tile_load(stages + s * kStageBytes, &map_a, full + 8 * s, row0, step * kTile);", "mbarrier_arrive(full);"),
    ("tile_load(stages + s * kStageBytes + kTileBytes, &map_b, full + 8 * s, column0, step * kTile);", ""),
]
TWO_STEPS = ("  for (int step = 0; step < steps; ++step) {\n    const auto s = static_cast<uint32_t>(step % kStages), parity",
             "#pragma unroll 2\n  for (int step = 0; step < steps; ++step) {\n    const auto s = "
             "static_cast<uint32_t>(step % kStages), parity")  # fmt: skip


@needs_nvcc
@together
def test_unrolled_steps_may_wait_once_each(tmp_path):
    row = hopper(tmp_path, NO_BUGS, TWO_STEPS)
    assert {(loop.steps, loop.waits) for loop in row.loops} >= {(2, 2)}
    assert records.hopper(row) == []


@needs_nvcc
@together
@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param([SECOND_WAIT], "2 barrier waits in 1 k steps of the main loop", id="second wait"),
        pytest.param([SECOND_WAIT, TWO_STEPS], "4 barrier waits in 2 k steps", id="second wait, unrolled"),
        pytest.param(NO_TILES, "HGMMA without UTMALDG", id="no tile copies"),
    ],
)
def test_a_slower_loop_is_noticed(tmp_path, changes, message):
    assert message in "\n".join(records.hopper(hopper(tmp_path, NO_BUGS, *changes)))


@needs_nvcc
@together
def test_products_that_wait_for_each_other_are_noticed(tmp_path):
    """With bugs that are chosen at run time the fence is conditional, and ptxas puts waits around every product."""
    assert any("serialised" in p for p in records.hopper(hopper(tmp_path)))

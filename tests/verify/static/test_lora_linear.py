"""Every Triton launch compiles ahead of time: without spills, with wide memory accesses, within recorded bounds.

What is compiled, and what must hold of it, is in ``peftkern/verify/static/launches/lora_linear.py``; ``peftkern verify --static``
runs that too. Registers, shared memory and the instruction mix differ between versions of Triton. Their bounds are written,
for the version in use, by

    python -m peftkern verify --static --kernels triton --record

Another version is put in use by ``pip install --no-deps --target DIR triton==...`` and ``PYTHONPATH=DIR``.
"""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="Triton is an optional dependency")

from triton.backends.compiler import GPUTarget

from peftkern.verify.static import cubins, disassembly, records, sass
from peftkern.verify.static.launches import lora_linear as launches
from peftkern.verify.static.triton import ARCHS, VERSION, key, source, unavailable

if reason := unavailable():
    pytest.skip(reason, allow_module_level=True)


# sm_120 has the registers of sm_90, less shared memory and neither wgmma nor tensor memory.
EVERY = (*ARCHS, 120)
# An architecture's kernels are compiled by one worker, at once.
every_arch = pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=[pytest.mark.xdist_group(f"aot-sm_{a}"), pytest.mark.slow(8)]) for a in EVERY]
)


@every_arch
def test_fits_without_spills(arch, reports):
    found = {r.key: launches.resources(r) for r in reports(launches, EVERY, arch)}
    assert found and not any(found.values()), {k: p for k, p in found.items() if p}


@every_arch
def test_memory_accesses_are_wide(arch, reports):
    """Each access moves 16 bytes, or where a thread's share of the block is smaller, at least that share."""
    found = {r.key: launches.widths(r) for r in reports(launches, EVERY, arch)}
    assert found and not any(found.values()), {k: p for k, p in found.items() if p}


@every_arch
def test_matrix_instructions(arch, reports):
    """K1 with its own product takes the widest instruction that its tile allows, with both operands copied in bulk."""
    found = [r for r in reports(launches, EVERY, arch) if launches.multiplies(r)]
    assert {r.item.name for r in found} == {"expand_kernel", "shrink_kernel", "adapter_grad_kernel", "row_norm_kernel"}
    for r in found:
        assert not launches.instructions(r), r.key


@every_arch
def test_registers_and_shared_memory_within_recorded_bounds(arch, reports):
    bounds, unknown = records.read(launches.BOUNDS), 0
    for r in reports(launches, EVERY, arch):
        assert not records.broken(r.row, bounds.get(r.key, {})), r.key
        unknown += VERSION not in bounds[r.key]
    if unknown:
        pytest.skip(f"registers differ between versions of Triton, and none were recorded with {VERSION}")


@pytest.mark.xdist_group("aot-sm_90")
@pytest.mark.slow(1)
def test_kernels_printed_together_read_as_each_alone(tmp_path, reports):
    """Their instructions; labels are those of kernels with HGMMA, whose loops are looked at."""
    target, items = GPUTarget("cuda", 90, 32), {r.item.name: r.item for r in reports(launches, EVERY, 90)}
    files = [tmp_path / name for name in items]
    for file, item in zip(files, items.values()):
        file.write_bytes(triton.compile(source(item), target=target, options=item.options).asm["cubin"])
    described = [cubins.run("cuobjdump", "-res-usage", "-elf", file) for file in files]
    together, alone = (disassembly.functions(files, described, cubins.run, way) for way in (True, False))
    for name, (ours,), (theirs,) in zip(items, together, alone):
        assert ours.name == theirs.name == name
        assert [i[:2] for i in ours.code] == [i[:2] for i in theirs.code]
        assert sass.mix(ours) == sass.mix(theirs) and (ours == theirs) == ("HGMMA" in sass.mix(theirs)), name
    assert {len(ours.labels) > 0 for (ours,) in together} == {True, False}


def test_no_bound_is_stale():
    used = {key(item, case.arch) for case in [*launches.STANDARD, *launches.MORE] for item in launches.capture(case)}
    assert records.read(launches.BOUNDS).keys() == used, "variants have changed: record the bounds anew"

"""Reading machine code: kinds of instructions, loops and their waits, occupancy, names."""

from __future__ import annotations

import pytest

from peftkern.verify.static import cubins, occupancy, sass
from peftkern.verify.static.loops import MainLoop, main_loops

WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R7+URZ+0x8000], R4"
ARRIVE = "@!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R7+URZ+0x8010], RZ"
STEP = ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"]


def function(*lines: str) -> sass.Function:
    """What nvdisasm would print of these instructions and labels."""
    text, at = ['\t.section\t.text.kernel,"ax",@progbits', ".text.kernel:"], 0
    for line in lines:
        text.append(line if line.endswith(":") else f"        /*{at:04x}*/                   {line} ;")
        at += 0 if line.endswith(":") else 16
    (found,) = sass.functions("\n".join(text))
    return found


def mix(*lines: str) -> dict[str, int]:
    return sass.mix(function(*lines))


@pytest.mark.parametrize(
    "line, kind",
    [
        ("LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", "LDG.128"),
        ("@!P0 LDG.E.LTC128B.64 R4, desc[UR4][R2.64]", "LDG.64"),
        ("LDG.E R4, [R2.64]", "LDG.32"),
        ("LDG.E.STRONG.GPU R4, [R2.64]", "LDG.32"),
        ("LD.E.U16 R4, desc[UR4][R2.64]", "LDG.16"),
        ("STG.E.U8 desc[UR4][R2.64], R4", "STG.8"),
        ("ST.E.128 desc[UR4][R2.64], R4", "STG.128"),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR4][R2.64]", "LDGSTS.128"),
        ("LDGSTS.E [R3], desc[UR4][R2.64]", "LDGSTS.32"),
        ("HMMA.16816.F32.BF16 R4, R8, R10, R4", "HMMA"),
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", "HGMMA"),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0", "UTCMMA"),
        ("UTMALDG.2D.MULTICAST [UR4], [UR10], UR12", "UTMALDG"),
        ("STL.64 [R1], R28", "STL"),
        ("LDL R4, [R1+0x8]", "LDL"),
        ("ATOMG.E.ADD.STRONG.GPU PT, R4, desc[UR4][R2.64], R5", "atomic"),
        ("REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5", "float atomic"),
        ("RED.E.ADD.F16x2.RN.STRONG.GPU desc[UR4][R2.64], R5", "float atomic"),
        ("ATOMS.CAST.SPIN.64 R4, [R2], R4, R6", "float atomic"),
        ("UTMAREDG.2D.ADD [UR4], [UR10]", "float atomic"),
    ],
)
def test_kinds(line, kind):
    assert mix(line, "EXIT") == {kind: 1}


@pytest.mark.parametrize(
    "line", ["REDUX.SUM.S32 UR4, R5", "HFMA2.MMA R4, R5, R6, R7", "LDS.128 R4, [R2]", "LDSM.16.M88.4 R4, [R2]"]
)
def test_other_instructions_do_not_count(line):
    assert mix(line, "EXIT") == {}


def test_narrow():
    assert [k for k in ("LDG.128", "LDG.256", "LDG.64", "STG.16", "LDGSTS.32", "HMMA") if sass.narrow(k)] == [
        "LDG.64", "STG.16", "LDGSTS.32",
    ]  # fmt: skip


def test_a_wait_and_its_repetition_count_once():
    """The first try stands in the loop, the others after the kernel's end, where they jump back from."""
    code = function(
        "MOV R3, RZ", ".L_1:", WAIT, "@!P0 BRA `(.L_3)", ".L_2:", *STEP, "WARPGROUP.DEPBAR.LE gsb0, 0x0", ARRIVE,
        "@!P2 BRA `(.L_1)", "EXIT", ".L_3:", "YIELD", WAIT, "@!P0 BRA `(.L_3)", "BRA `(.L_2)",
    )  # fmt: skip
    (loop,) = main_loops(code)
    assert loop == MainLoop(products=2, groups=1, waits=1, arrivals=1) and not loop.problems()


def test_a_repetition_that_waits_for_something_else_counts():
    other = WAIT.replace("0x8000", "0x8008")
    code = function(
        ".L_1:", WAIT, "@!P0 BRA `(.L_3)", ".L_2:", *STEP, ARRIVE, "@!P2 BRA `(.L_1)", "EXIT",
        ".L_3:", other, "@!P0 BRA `(.L_3)", "BRA `(.L_2)",
    )  # fmt: skip
    (loop,) = main_loops(code)
    assert loop.waits == 2 and "2 barrier waits in 1 k steps" in loop.problems()[0]


def test_a_loop_that_only_spins_is_one_wait():
    code = function(".L_1:", ".L_2:", WAIT, "@!P0 BRA `(.L_2)", *STEP, ARRIVE, "@!P2 BRA `(.L_1)", "EXIT")
    (loop,) = main_loops(code)
    assert loop.waits == 1


def test_two_steps_a_turn_may_wait_twice_but_not_thrice():
    turn = [WAIT, *STEP, ARRIVE]
    for extra, bad in (((), False), ((WAIT,), True)):
        (loop,) = main_loops(function(".L_1:", *turn, *turn, *extra, "@!P2 BRA `(.L_1)", "EXIT"))
        assert (loop.steps, loop.waits, bool(loop.problems())) == (2, 2 + len(extra), bad)


def test_the_innermost_loop_is_the_main_loop():
    """A tile's loop waits for other things too."""
    code = function(
        ".L_0:", WAIT, WAIT, ".L_1:", WAIT, *STEP, ARRIVE, "@!P2 BRA `(.L_1)", WAIT, *STEP, "@!P3 BRA `(.L_0)", "EXIT"
    )  # fmt: skip
    (loop,) = main_loops(code)
    assert (loop.products, loop.waits) == (2, 1)


def test_reconvergence_leads_to_the_named_label():
    """BSYNC, which stands before the label in no way, closes the loop."""
    code = function(
        "BRA `(.L_0)", ".L_9:", "BSYNC B0", ".L_0:", "BSSY B0, `(.L_5)", WAIT, "@!P0 BRA `(.L_9)", *STEP, "BRA `(.L_9)",
        ".L_7:", "EXIT", ".L_5:", "@!P4 BRA `(.L_0)", "BRA `(.L_7)",
    )  # fmt: skip
    (loop,) = main_loops(code)
    assert (loop.products, loop.waits) == (2, 1)


def test_serialised_products_are_a_problem():
    alone = ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    (loop,) = main_loops(function(".L_1:", WAIT, *alone, *alone, ARRIVE, "@!P2 BRA `(.L_1)", "EXIT"))
    assert "serialised" in loop.problems()[0]


def test_no_products_no_main_loop():
    assert main_loops(function(".L_1:", WAIT, "@!P0 BRA `(.L_1)", "EXIT")) == ()
    assert main_loops(function(*STEP, "EXIT")) == ()


@pytest.mark.parametrize(
    "arch, threads, registers, shared, blocks",
    [
        ("sm_80", 256, 32, 0, 8),  # threads
        ("sm_80", 32, 16, 0, 32),  # blocks
        ("sm_80", 256, 80, 0, 3),  # registers
        ("sm_80", 256, 255, 0, 1),
        ("sm_80", 1024, 65, 0, 0),  # 32 warps of 72 registers: more than there are
        ("sm_90", 384, 168, 0, 1),
        ("sm_90a", 128, 32, 112 << 10, 2),  # shared memory, 1 KiB more for each block
        ("sm_90", 128, 32, 114 << 10, 1),
        ("sm_90", 128, 32, 228 << 10, 0),
        ("sm_120", 256, 32, 0, 6),
        ("sm_120", 128, 32, 99 << 10, 1),
    ],
)
def test_occupancy(arch, threads, registers, shared, blocks):
    assert occupancy.blocks(arch, threads, registers, shared) == blocks


@pytest.mark.parametrize(
    "symbol, name",
    [
        (
            "_ZN8peftkern4cuda39_GLOBAL__N__35ac4a67_7_sgmv_cu_ec7b017c11sgmv_kernelINS_4bf16EfEEvNS0_8SgmvArgsE",
            "sgmv_kernel<bf16, float>",
        ),
        # As the host compiler writes it.
        ("_ZN8peftkern4cuda12_GLOBAL__N_111sgmv_kernelINS_4bf16EfEEvNS0_8SgmvArgsE", "sgmv_kernel<bf16, float>"),
        ("_ZN8peftkern4cuda12_GLOBAL__N_16kernelILi128ELb1EEEvPf", "kernel<128, true>"),
        ("expand_kernel", "expand_kernel"),
    ],
)
def test_names(symbol, name):
    assert cubins.readable(symbol) == name

"""Vectors of adapters in the segmented branch, run on the CPU against the equation in fp64.

Those of the branch (d, p_d, g_d) act in both kernels, those of the base (g_b, beta) where there are clusters; p_b is a
launch of its own.
"""

from __future__ import annotations

import copy
import ctypes

import pytest
import torch
from sgmv_batch import PAIRS, Batch, check, check_scaled

BRANCH = ("d", "p_d", "g_d", "d p_d g_d", "")
WHOLE = ("d g_b", "p_d beta", "g_b beta", "d p_d g_d g_b beta", "")
KERNELS = [(80, *p) for p in PAIRS] + [(90, *p) for p in PAIRS[1:]]


def give(batch: Batch, arch: int, base: bool = True) -> Batch:
    """Vectors that the kernel takes; with ``base`` a bias too, and the base product elsewhere."""
    batch.give(*(BRANCH if arch == 80 else WHOLE), seed=batch.M)
    if arch == 90 and base:
        gen = torch.Generator().manual_seed(batch.M)
        batch.src = torch.randn(batch.M, batch.N, generator=gen).to(batch.dtype)
        batch.bias = torch.randn(batch.N, generator=gen).to(batch.dtype if batch.M % 2 else torch.float32)
    return batch


@pytest.mark.parametrize("arch, dtype, adapter_dtype", KERNELS)
@pytest.mark.parametrize(
    "M, K, N, ranks",
    [(1, 1, 1, (1,)), (13, 40, 33, (3, 16, 0, 7, 5)), (12, 1031, 20, (8, 2, 0, 17)), (7, 17, 515, (1, 40, 0, 7, 0))],
)
def test_vectors(sim, M, K, N, ranks, arch, dtype, adapter_dtype):
    for transposed in (False, True):
        gap = 0 if transposed else 8 if M == 7 else 3
        ids = torch.arange(M) % (len(ranks) + 1) - int(M > 1)
        batch = Batch(M, K, N, ranks, dtype, adapter_dtype, M + K, transposed, ids, gap=gap)
        give(batch, arch, base=transposed)
        check(batch, batch.run(sim, arch, launches=2, seed=M, at_end=not transposed))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype, adapter_dtype", PAIRS[1:])
def test_wide_loads(sim, arch, dtype, adapter_dtype):
    """As they lie in a bank: one tile of rows, and several."""
    for M, K, N in ((15, 264, 640), (230, 72, 136), (6, 40, 66)):
        ids = torch.arange(M) % 6 - 1
        batch = Batch(M, K, N, (16, 8, 24, 40, 5), dtype, adapter_dtype, M, True, ids, bank=True, gap=8)
        check(give(batch, arch), batch.run(sim, arch, seed=M))


@pytest.mark.parametrize("dtype, adapter_dtype", PAIRS[1:])
def test_items_of_64_rows(sim, dtype, adapter_dtype):
    """Where the base is scaled, those without an adapter are rows as all others; and alone a row has the same bits."""
    ids = torch.tensor([1] * 70 + [3] * 35 + [2] * 20 + [-1] * 900 + [7] * 2)[torch.randperm(1027)]
    batch = Batch(1027, 72, 72, (16, 24, 0, 40, 8), dtype, adapter_dtype, 2, True, ids, bank=True)
    got = give(batch, 90).run(sim, 90)
    check(batch, got)
    for slot in (-1, 1, 2, 3):
        check_alone(sim, 90, batch, got, (ids == slot).nonzero()[-1].item())


def check_alone(sim, arch: int, batch: Batch, got: torch.Tensor, t: int) -> None:
    alone = copy.copy(batch)
    alone.M, alone.x, alone.y = 1, batch.x[t : t + 1], batch.y[t : t + 1]
    alone.src = None if batch.src is None else batch.src[t : t + 1]
    alone.route(batch.ids[t : t + 1])
    assert torch.equal(alone.run(sim, arch), got[t : t + 1])


@pytest.mark.parametrize("arch, dtype", [(80, torch.float32), (90, torch.bfloat16), (90, torch.float16)])
@pytest.mark.parametrize("bank", [False, True])
def test_rows_do_not_depend_on_the_batch(sim, arch, dtype, bank):
    ids = torch.arange(24) % 6 - 1
    batch = Batch(24, 1040, 72, (6, 20, 3, 8, 16), dtype, torch.float32, 5, bank, ids, bank=bank)
    together = give(batch, arch).run(sim, arch)
    for t in (1, 2, 4):
        check_alone(sim, arch, batch, together, t)


@pytest.mark.parametrize("arch, dtype, adapter_dtype", [KERNELS[0], *KERNELS[5:]])
def test_an_adapter_without_vectors_has_the_bits_of_a_launch_without(sim, arch, dtype, adapter_dtype):
    ids = torch.arange(40) % 5
    batch = Batch(40, 136, 72, (6, 20, 3, 8, 16), dtype, adapter_dtype, 5, True, ids, bank=True)
    plain = batch.run(sim, arch)
    assert torch.equal(give(batch, arch, base=False).run(sim, arch)[ids == 4], plain[ids == 4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_a_bias_and_no_vectors(sim, dtype, bias_dtype):
    """Every row gets it once, those of invalid ids are NaN."""
    ids = torch.tensor([0, -1, 2, 1, 9, -1, 1])
    batch = Batch(7, 40, 57, (4, 0, 9), dtype, torch.float32, seed=1, ids=ids)
    batch.bias = torch.randn(57, generator=torch.Generator().manual_seed(1)).to(bias_dtype or dtype)
    check(batch, batch.run(sim, 90, launches=2))


def test_every_schedule_gives_the_same_bits(sim):
    ids = torch.arange(9) % 4 - 1
    batch = give(Batch(9, 300, 130, (5, 16, 0), torch.bfloat16, torch.bfloat16, seed=3, ids=ids), 90)
    expected = batch.run(sim, 90)
    check(batch, expected)
    for seed, mode in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        assert torch.equal(batch.run(sim, 90, seed=seed, mode=mode, resident=seed + 1), expected)


@pytest.mark.parametrize("arch", [80, 90])
def test_behind_a_launch_that_still_runs(sim, arch):
    """Which writes ``src`` too."""
    for seed, ids in enumerate((torch.tensor([0, 1, -1, 1]), torch.tensor([-1, 3, 2, -1]), torch.full((4,), -1))):
        batch = Batch(4, 40, 80, (4, 2, 0), torch.float16, torch.float16, seed=seed, ids=ids, transposed=True)
        check(batch, give(batch, arch).run(sim, arch, seed=seed, dependent=True))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("which, vectors", [("A_TENSOR", False), ("B_TENSOR", True), ("g_d", True)])
def test_what_came_after_a_graph_was_captured(sim, arch, which, vectors):
    """Rows of an adapter that lies in a tensor that the launch does not know are NaN, and nothing there is read."""
    ids = torch.tensor([0, 1, 1, -1, 2, 1])
    batch = Batch(6, 24, 600, (4, 2, 0), torch.bfloat16, torch.float32, seed=1, ids=ids)
    if vectors:
        give(batch, arch, base=False)
    expected = batch.run(sim, arch)
    check(batch, expected)
    for row in batch.rows[1:]:
        row[batch.column(which)] = 2
    got = batch.run(sim, arch, u=False)
    # Without a rank there is no matrix to be known.
    lost = (ids == 1) | ((ids == 2) & (which == "g_d"))
    assert got[lost].isnan().all() and torch.equal(got[~lost], expected[~lost])


def test_what_acts_on_the_base_needs_clusters(sim):
    batch = Batch(2, 24, 40, (4,), torch.bfloat16, torch.float32, seed=1)
    for name in ("src", "bias"):
        other = copy.copy(batch)
        setattr(other, name, torch.zeros(2, 40, dtype=torch.bfloat16) if name == "src" else torch.zeros(40))
        with pytest.raises(Exception, match="cudaErrorInvalidValue"):
            other.run(sim, 80)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize("K", [1, 40, 1029, 2056])
def test_scale_rows(sim, K, bank, dtype):
    """Of an adapter without p_b, of none, and of an invalid id, the bits of x."""
    ids = torch.tensor([0, 1, -1, 2, 9, 0, 3])
    batch = Batch(7, K, 8, (4, 0, 1, 2), dtype, torch.float32, seed=K, ids=ids, bank=bank, gap=8 if bank else 3)
    batch.give("p_b g_b", "p_b", "d", "p_b")
    check_scaled(batch, batch.scale(sim))
    batch.rows[3][batch.column("p_b")] = 2  # a tensor that the launch does not know
    del batch.own[3]["p_b"]
    check_scaled(batch, batch.scale(sim))


def test_more_blocks_than_a_grid_has(sim):
    batch = Batch(3, 24, 40, (4,), torch.bfloat16, torch.float32, seed=1).give("p_b")
    batch.M = 2**31
    with sim.memory() as memory, pytest.raises(Exception, match="cudaErrorInvalidConfiguration"):
        sim.run("sim_scale_rows", memory.put(batch.sizes(90)), *[ctypes.c_void_p()] * 6)

"""The segmented branch, run on the CPU: ragged shapes, ranks, ids and layouts, against the equation in fp64.

Two kernels: by tickets (any dtype and device; here arch 80) and, in half precision, by clusters (arch 90).
"""

from __future__ import annotations

import copy

import pytest
import torch
from sgmv_batch import PAIRS, Batch, check

MODES = [(schedule, completion) for schedule in (0, 1) for completion in (0, 1)]
KERNELS = [(80, *p) for p in PAIRS] + [(90, *p) for p in PAIRS[1:]]


@pytest.mark.parametrize("arch, dtype, adapter_dtype", KERNELS)
@pytest.mark.parametrize(
    "M, K, N, ranks",
    [
        (1, 1, 1, (1,)),
        (7, 40, 33, (3, 16)),
        (6, 1032, 20, (8, 0, 5)),
        (13, 17, 515, (1, 40, 7)),
        (2, 2056, 9, (128,)),
    ],
)
def test_branch(sim, M, K, N, ranks, arch, dtype, adapter_dtype):
    for transposed in (False, True):
        gap = 0 if transposed else 8 if M == 7 else 3
        batch = Batch(M, K, N, ranks, dtype, adapter_dtype, seed=M + K, transposed=transposed, gap=gap)
        check(batch, batch.run(sim, arch, launches=2, seed=M, at_end=not transposed))


@pytest.mark.parametrize("dtype, adapter_dtype", PAIRS[1:])
@pytest.mark.parametrize(
    "M, K, N, ranks", [(5, 4096, 640, (16, 64)), (3, 264, 1024, (8,)), (40, 72, 88, (24, 4)), (3, 48, 60, (5,))]
)
def test_wide_loads(sim, M, K, N, ranks, dtype, adapter_dtype):
    """Addresses and strides as a bank has them."""
    for transposed in (True, False):
        ids = torch.arange(M) % len(ranks)
        batch = Batch(M, K, N, ranks, dtype, adapter_dtype, M, transposed, ids, bank=True, gap=8)
        check(batch, batch.run(sim, 90, seed=M, at_end=transposed))


@pytest.mark.parametrize("dtype, adapter_dtype", PAIRS[1:])
@pytest.mark.parametrize("bank", [False, True])
def test_many_rows_of_an_adapter(sim, dtype, adapter_dtype, bank):
    """Prefill: several items a segment, the last one with fewer rows, numbered by segment."""
    ids = torch.tensor([1] * 77 + [-1] * 3 + [0] * 17 + [2] * 130 + [5] * 2 + [3])[torch.randperm(230)]
    batch = Batch(230, 72, 136, (16, 40, 1, 7), dtype, adapter_dtype, seed=2, transposed=bank, ids=ids, bank=bank)
    check(batch, batch.run(sim, 90))


@pytest.mark.parametrize("dtype, adapter_dtype", PAIRS[1:])
def test_items_of_64_rows(sim, dtype, adapter_dtype):
    """From 1024 rows on: whole items and parts of one, of as many ranks as one, two and three products have."""
    ids = torch.tensor([1] * 70 + [0] * 35 + [2] * 20 + [-1] * 900 + [5] * 2)[torch.randperm(1027)]
    batch = Batch(1027, 72, 136, (16, 24, 40), dtype, adapter_dtype, seed=2, transposed=True, ids=ids, bank=True)
    got = batch.run(sim, 90)
    check(batch, got)
    # The same bits as alone, in an item of 16 rows.
    for slot in range(3):
        check_alone(sim, 90, batch, got, (ids == slot).nonzero()[-1].item())


@pytest.mark.parametrize("arch", [80, 90])
def test_rank_200(sim, arch):
    """Above 128, an item has 16 rows."""
    ids = torch.tensor([0] * 20 + [1] * 2)
    batch = Batch(22, 40, 72, (200, 130), torch.bfloat16, torch.float32, seed=9, transposed=True, ids=ids)
    check(batch, batch.run(sim, arch))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", [80, 90])
def test_every_schedule_gives_the_same_bits(sim, mode, arch):
    batch = Batch(9, 1104, 530, (5, 16, 2), torch.bfloat16, torch.bfloat16, seed=3)
    expected = batch.run(sim, arch)
    check(batch, expected)
    for seed in range(3):
        assert torch.equal(batch.run(sim, arch, seed=seed, mode=mode, resident=seed + 1), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch, dtype", [(80, torch.float32), (90, torch.bfloat16)])
def test_sums_are_read_after_they_were_published(sim, mode, arch, dtype):
    """Few blocks, all of them at work at the same time, many schedules."""
    batch = Batch(2, 24, 8, (9, 8), dtype, torch.float32, seed=7, ids=torch.tensor([0, 1]))
    for seed in range(24 if arch == 80 else 6):
        check(batch, batch.run(sim, arch, seed=seed, mode=mode, resident=4))


def check_alone(sim, arch: int, batch: Batch, got: torch.Tensor, t: int) -> None:
    alone = copy.copy(batch)
    alone.M, alone.x, alone.y = 1, batch.x[t : t + 1], batch.y[t : t + 1]
    alone.route(batch.ids[t : t + 1])
    assert torch.equal(alone.run(sim, arch), got[t : t + 1]) or got[t].isnan().any()


@pytest.mark.parametrize("arch, dtype", [(80, torch.float32), (90, torch.bfloat16), (90, torch.float16)])
@pytest.mark.parametrize("M, bank", [(11, False), (70, True)])
def test_rows_do_not_depend_on_the_batch(sim, arch, dtype, M, bank):
    """A row's bits are those it gets alone, whatever rows share its adapter or its launch."""
    batch = Batch(M, 1040, 72, (6, 20), dtype, torch.float32, seed=5, bank=bank, transposed=bank)
    together = batch.run(sim, arch)
    for t in (0, 4, M - 1):
        check_alone(sim, arch, batch, together, t)


@pytest.mark.parametrize("arch", [80, 90])
def test_ids_without_an_adapter(sim, arch):
    """-1 leaves the row alone, an id that nobody has makes it NaN."""
    ids = torch.tensor([0, 7, -1, 1, 7, -1])
    batch = Batch(6, 24, 600, (4, 2), torch.bfloat16, torch.float32, seed=1, ids=ids)
    got = batch.run(sim, arch)
    check(batch, got)
    assert got[[1, 4]].isnan().all()
    for some in (torch.full((70,), -1), torch.full((70,), 9)):
        batch = Batch(70, 24, 40, (4, 2), torch.bfloat16, torch.float32, seed=1, ids=some)
        check(batch, batch.run(sim, arch))


@pytest.mark.parametrize("arch", [80, 90])
def test_behind_a_launch_that_still_runs(sim, arch):
    """What that launch, or one before it, may use is touched after it has ended; and it has ended when this one has."""
    for seed, ids in enumerate((None, torch.tensor([-1, 3, -1, -1]), torch.full((4,), -1))):
        batch = Batch(4, 40, 80, (4, 2), torch.float16, torch.float16, seed=seed, ids=ids, transposed=True)
        check(batch, batch.run(sim, arch, seed=seed, dependent=True))

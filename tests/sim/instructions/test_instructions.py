"""Host bodies of the instructions of sm_80 and of the conversions, against plain definitions of their layouts."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from peftkern.ops.dropout_mask import dropout_mask_ref

LANES = np.arange(32)


def bits(values: np.ndarray, is_f16: bool) -> np.ndarray:
    """16-bit patterns of fp32 values."""
    return (
        torch.from_numpy(values)
        .to(torch.float16 if is_f16 else torch.bfloat16)
        .view(torch.int16)
        .numpy()
        .view(np.uint16)
    )


def halves(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


@pytest.mark.parametrize("is_f16", [False, True])
def test_mma(sim, is_f16):
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    g, t = LANES // 4, LANES % 4
    ab, bb = bits(a, is_f16), bits(b, is_f16)
    # As the PTX ISA numbers them: a register's row is g, or g + 8 if it is odd; its columns move by 8 after two.
    words_a = np.stack([halves(ab[g + r, 2 * t + k], ab[g + r, 2 * t + k + 1]) for k in (0, 8) for r in (0, 8)], 1)
    words_b = np.stack([halves(bb[2 * t + k, g], bb[2 * t + k + 1, g]) for k in (0, 8)], 1)
    with sim.memory() as memory:
        d = memory.put(np.stack([c[g + r, 2 * t + j] for r in (0, 8) for j in (0, 1)], 1))
        sim.run("sim_mma", int(is_f16), memory.put(words_a), memory.put(words_b), d)
        got = np.empty((16, 8), np.float32)
        for i in range(4):
            got[g + i // 2 * 8, 2 * t + i % 2] = d.array[:, i]
    np.testing.assert_array_equal(got, a @ b + c)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_load_matrices(sim, count, transposed):
    rng = np.random.default_rng(count)
    rows = rng.integers(0, 1 << 16, (64, 8)).astype(np.uint16)
    where = rng.permutation(64)[:32].astype(np.int32)
    with sim.memory() as memory:
        out = memory.empty((32, count), np.uint32)
        sim.run("sim_load_matrices", count, int(transposed), memory.put(rows), memory.put(where), out)
        got = out.array.copy()
    for i in range(count):
        matrix = rows[where[8 * i : 8 * i + 8]]
        matrix = matrix.T if transposed else matrix
        np.testing.assert_array_equal(
            got[:, i], halves(matrix[LANES // 4, LANES % 4 * 2], matrix[LANES // 4, LANES % 4 * 2 + 1])
        )


@pytest.mark.parametrize("argument", [0, 1, 5, 16, 31])
def test_shuffles_and_votes(sim, argument):
    values = np.random.default_rng(argument).integers(0, 1 << 31, 32).astype(np.uint32)
    with sim.memory() as memory:
        out = memory.empty((32, 8), np.uint32)
        sim.run("sim_warp", memory.put(values), argument, out, seed=argument)
        got = out.array.copy()
    np.testing.assert_array_equal(got[:, 0], values[(LANES + argument) % 32])
    np.testing.assert_array_equal(got[:, 1], values[np.where(LANES >= argument, LANES - argument, LANES)])
    np.testing.assert_array_equal(got[:, 2], values[np.where(LANES + argument < 32, LANES + argument, LANES)])
    np.testing.assert_array_equal(got[:, 3], values[LANES ^ argument])
    third = values % 3 == 0
    assert set(got[:, 4]) == {sum(1 << int(i) for i in np.flatnonzero(third))}
    assert set(got[:, 5]) == {int(third.any())} and set(got[:, 6]) == {int(third.all())}
    even = values % 2 == 0
    low, high = (sum(1 << int(i) for i in np.flatnonzero(m)) for m in (even & (LANES < 10), ~even & (LANES >= 10)))
    assert set(got[:10, 7]) == {low} and set(got[10:, 7]) == {high}


def test_a_lane_that_stays_away_is_reported(sim):
    with sim.memory() as memory, pytest.raises(Exception, match="ballot"):
        sim.run("sim_diverged", memory.empty(32, np.uint32))


def test_conversions(sim):
    every = np.arange(1 << 16, dtype=np.uint16)
    exact = [torch.from_numpy(every.view(np.int16)).view(t).float().numpy() for t in (torch.bfloat16, torch.float16)]
    rng = np.random.default_rng(0)
    odd = rng.integers(0, 1 << 32, 4000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = (rng.standard_normal(4000) * 2.0 ** rng.integers(-30, 20, 4000)).astype(np.float32)
    ties = exact[1][np.isfinite(exact[1])][:4000] * np.float32(1 + 2.0**-11)
    values = np.concatenate([e[:: 1 if len(e) < 9000 else 17] for e in (*exact, odd, near, ties)]).astype(np.float32)
    values = np.concatenate(
        [values, np.float32([65504, 65519.99, 65520, 1e-8, 2.0**-25, -(2.0**-24), np.inf, -np.inf])]
    )
    n = len(values)
    with sim.memory() as memory:
        b, h = memory.empty(n, np.uint16), memory.empty(n, np.uint16)
        bf, hf = memory.empty(n, np.float32), memory.empty(n, np.float32)
        packed = memory.empty((n, 2), np.uint32)
        sim.run("sim_convert", memory.put(values), n, b, h, bf, hf, packed)
        got = [b.array.copy(), h.array.copy(), bf.array.copy(), hf.array.copy(), packed.array.copy()]
    real = ~np.isnan(values)  # NaN has many patterns
    for ours, back, t in ((got[0], got[2], torch.bfloat16), (got[1], got[3], torch.float16)):
        expected = torch.from_numpy(values).to(t)
        np.testing.assert_array_equal(ours[real], expected.view(torch.int16).numpy().view(np.uint16)[real])
        np.testing.assert_array_equal(back, expected.float().numpy())
    np.testing.assert_array_equal(got[4][:, 0], halves(got[0], np.full(n, 0x3F80)))
    np.testing.assert_array_equal(got[4][:, 1], halves(np.full(n, 0x3C00), got[1]))


def test_multiply_wide(sim):
    pairs = np.random.default_rng(0).integers(0, 1 << 32, (200, 2), dtype=np.uint64).astype(np.uint32)
    pairs[:3] = (2**32 - 1, 2**32 - 1), (0, 2**32 - 1), (2**31, 2)
    with sim.memory() as memory:
        out = memory.empty(200, np.uint64)
        sim.run("sim_multiply_wide", memory.put(pairs), 200, out)
        np.testing.assert_array_equal(out.array, pairs[:, 0].astype(np.uint64) * pairs[:, 1])


@pytest.mark.parametrize("each", [4, 8, 16])
@pytest.mark.parametrize("length", [1, 37, 64, 65, 190])
def test_copy_async(sim, each, length):
    """Ragged ends are filled with zeros, and nothing past them is read."""
    size = length * each - (length % each)
    source = np.random.default_rng(length).integers(0, 256, size).astype(np.uint8)
    blocks = -(-length // 64)
    with sim.memory() as memory:
        # The start is aligned; bytes behind the end that no page guards must not matter.
        data, out = memory.put(source, alignment=16), memory.empty(blocks * 64 * each, np.uint8)
        sim.run("sim_copy", each, data, size, blocks, out, seed=length)
        got = out.array.copy()
    np.testing.assert_array_equal(got, np.concatenate([source, np.zeros(len(got) - size, np.uint8)]))


@pytest.mark.parametrize("seed", range(4))
def test_atomics(sim, seed):
    with sim.memory() as memory:
        counters, old = memory.put(np.zeros(3, np.uint32)), memory.empty(7 * 37, np.uint32)
        sim.run("sim_atomics", 7, 37, counters, old, seed=seed)
        assert sorted(old.array) == list(range(7 * 37))
        assert list(counters.array) == [7 * 37, max(i * 7 % 101 for i in range(7 * 37)), 7 * 37 % 5]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["sim_handover", "sim_phases"])
def test_named_barriers_and_transaction_barriers_hand_over(sim, name, seed):
    with sim.memory() as memory:
        out = memory.empty((9, 32), np.uint32)
        sim.run(name, 9, out, seed=seed)
        np.testing.assert_array_equal(out.array, np.arange(9)[:, None] * 100 + 31 - LANES)


@pytest.mark.parametrize("each", [4, 16])
def test_vector_loads_must_be_aligned(sim, each):
    source = np.arange(32 * each + 16, dtype=np.uint8)
    with sim.memory() as memory:
        data, out = memory.put(source, alignment=16), memory.empty(32 * each, np.uint8, alignment=16)
        sim.run("sim_load_once", each, data, out)
        np.testing.assert_array_equal(out.array, source[: 32 * each])
        data.address += 2
        with pytest.raises(Exception, match="not aligned"):
            sim.run("sim_load_once", each, data, out)
        data.address -= 2


@pytest.mark.parametrize("M, K", [(1, 1), (3, 7), (5, 8), (64, 129), (33, 1000)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.75])
def test_dropout_mask(sim, M, K, p):
    """The kernel of the product, bit for bit."""
    seed = np.array([-(2**40) - 12345 * M], np.int64)
    with sim.memory(at_end=M % 2 == 1) as memory:
        out = memory.empty((M, K), np.uint8)
        sim.run("sim_dropout_mask", memory.put(seed), M, K, int(p * 2.0**32), out, seed=K)
        got = out.array.copy()
    np.testing.assert_array_equal(got, dropout_mask_ref(torch.from_numpy(seed), M, K, p).numpy())


def test_kernels_contain_no_instructions_of_their_own():
    """Inline PTX, intrinsics and launches live in wrapper headers, where the simulator has a body for each."""
    from pathlib import Path

    root = Path(__file__).resolve().parents[3]
    sources = [*root.glob("csrc/cuda/**/*.cu"), *root.glob("tests/sim/kernels/**/*.cu")]
    assert len(sources) == 23
    for path in sources:
        text = re.sub(r"//.*", "", path.read_text())
        found = re.findall(
            r"\basm\b|<<<|\b__(?!global__|host__|device__|launch_bounds__|grid_constant__|restrict__)\w+", text
        )
        assert not found, f"{path.name}: {found}"

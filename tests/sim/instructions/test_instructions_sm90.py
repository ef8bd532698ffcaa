"""Host bodies of Hopper's instructions against plain definitions of their layouts."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

IMAGE = 48 * 1024


class WgmmaCase(ctypes.Structure):
    """As in kernels/instructions_sm90.cu."""

    _fields_ = [
        (name, ctypes.c_uint32) for name in ("a_offset", "b_offset", "stride_a", "leading_a", "stride_b", "leading_b")
    ] + [("accumulate", ctypes.c_int), ("fences", ctypes.c_int)]


def swizzled(tile: np.ndarray) -> np.ndarray:
    """Rows of 64 16-bit values as in memory with 128-byte swizzle: 16-byte piece j of row r lies at j ^ (r % 8)."""
    out = np.empty_like(tile)
    for r, row in enumerate(tile):
        for j in range(8):
            out[r, 8 * (j ^ r % 8) : 8 * (j ^ r % 8) + 8] = row[8 * j : 8 * j + 8]
    return out


def bits(values: np.ndarray, is_f16: bool) -> np.ndarray:
    return (
        torch.from_numpy(values)
        .to(torch.float16 if is_f16 else torch.bfloat16)
        .view(torch.int16)
        .numpy()
        .view(np.uint16)
    )


def place(image: np.ndarray, offset: int, matrix: np.ndarray, columns: bool) -> tuple[int, int]:
    """Writes an operand (outer, 64 along K) into shared memory; (stride, leading) of its descriptor."""
    outer = matrix.shape[0]
    if not columns:
        tile = swizzled(matrix)
        image[offset // 2 : offset // 2 + tile.size] = tile.ravel()
        return 1024, 16
    # M or N is contiguous: for every 64 of them, rows of K; 8 rows of K make an atom.
    blocks = [swizzled(np.ascontiguousarray(matrix[i : i + 64].T)) for i in range(0, outer, 64)]
    blocks = np.concatenate([b.ravel() for b in blocks])
    image[offset // 2 : offset // 2 + blocks.size] = blocks
    return 1024, 64 * 128


def run_wgmma(sim, n, columns_a, columns_b, registers, step, is_f16, fences=1) -> tuple[np.ndarray, np.ndarray]:
    """D, and what it should be."""
    rng = np.random.default_rng(n)
    a, b = (rng.integers(-4, 5, (rows, 64)).astype(np.float32) for rows in (64, n))
    start = rng.integers(-9, 10, (64, n)).astype(np.float32)
    image = np.full(IMAGE // 2, 0x7FFF, np.uint16)  # NaN
    stride_a, leading_a = place(image, 0, bits(a, is_f16), bool(columns_a))
    stride_b, leading_b = place(image, 8192, bits(b, is_f16), bool(columns_b))
    # Step along K: 32 bytes within a row, or two atoms of 8 rows.
    case = WgmmaCase(
        step * (2048 if columns_a else 32), 8192 + step * (2048 if columns_b else 32),
        stride_a, leading_a, stride_b, leading_b, int(step > 0), fences,
    )  # fmt: skip
    thread = np.arange(128)
    row, t = thread // 32 * 16 + thread % 32 // 4, thread % 4
    ak = bits(a[:, 16 * step : 16 * step + 16], is_f16).astype(np.uint32)
    words = np.stack([ak[row + r, 2 * t + k] | ak[row + r, 2 * t + k + 1] << 16 for k in (0, 8) for r in (0, 8)], 1)
    with sim.memory() as memory:
        d = memory.empty((128, n // 2), np.float32)
        for i in range(n // 2):
            d.array[:, i] = start[row + i // 2 % 2 * 8, i // 4 * 8 + 2 * t + i % 2]
        sim.run(
            "sim_wgmma", int(is_f16), n, memory.put(image), ctypes.byref(case),
            memory.put(words) if registers else None, d, seed=n + step,
        )  # fmt: skip
        got = np.empty((64, n), np.float32)
        for i in range(n // 2):
            got[row + i // 2 % 2 * 8, i // 4 * 8 + 2 * t + i % 2] = d.array[:, i]
    product = a[:, 16 * step : 16 * step + 16] @ b[:, 16 * step : 16 * step + 16].T
    return got, product + (start if step > 0 else 0)


@pytest.mark.parametrize("is_f16", [False, True])
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("n, columns_a, columns_b", [(16, 0, 0), (32, 1, 0), (64, 0, 1), (128, 1, 1), (256, 0, 0)])
@pytest.mark.parametrize("registers", [False, True])
def test_wgmma(sim, n, columns_a, columns_b, registers, step, is_f16):
    got, expected = run_wgmma(sim, n, columns_a, columns_b, registers, step, is_f16)
    np.testing.assert_array_equal(got, expected)


def test_wgmma_does_not_see_ordinary_stores_before_the_fence(sim):
    got, _ = run_wgmma(sim, 64, 0, 0, False, 0, False, fences=0)
    assert np.isnan(got).all()


@pytest.mark.parametrize("row, column", [(0, 0), (8, 64), (90, 64), (-3, -5), (97, 100), (200, 0)])
@pytest.mark.parametrize("box, swizzle", [((64, 64), 1), ((24, 64), 1), ((16, 32), 0), ((128, 8), 0)])
def test_tile_load(sim, row, column, box, swizzle):
    """The tile, swizzled or not; zeros for what lies outside the matrix."""
    rows, columns, stride = 100, 107, 112
    data = np.arange(1, rows * stride + 1, dtype=np.uint16).reshape(rows, stride)
    padded = np.zeros((600, 600), np.uint16)
    padded[200 : 200 + rows, 200 : 200 + columns] = data[:, :columns]
    tile = padded[200 + row : 200 + row + box[0], 200 + column : 200 + column + box[1]]
    with sim.memory() as memory:
        out = memory.empty(box, np.uint16)
        source = memory.put(data, alignment=16)
        sim.run("sim_tile", source, rows, columns, stride, *box, swizzle, row, column, out, seed=row + 7)
        np.testing.assert_array_equal(out.array, swizzled(tile) if swizzle else tile)


@pytest.mark.parametrize("seed", range(4))
def test_cluster_barrier_and_register_moves(sim, seed):
    with sim.memory() as memory:
        between, out = memory.empty((8, 256), np.uint32), memory.empty((8, 256), np.uint32)
        sim.run("sim_cluster", between, out, seed=seed)
        block = np.arange(8)
        neighbour = block // 4 * 4 + (block % 4 + 1) % 4
        np.testing.assert_array_equal(out.array, neighbour[:, None] * 1000 + np.arange(256))

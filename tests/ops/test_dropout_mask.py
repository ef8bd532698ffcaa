"""dropout_mask: the generator itself, its law, and its independence of shape."""

import math

import numpy as np
import pytest
import torch

from peftkern import dropout_mask
from peftkern.ops.dropout_mask import threshold


def philox_numpy(seed: int, row: int, group: int, rounds: int = 7) -> list[int]:
    """Philox4x32 for one counter, in Python integers: an independent statement."""
    low = 0xFFFFFFFF
    c = [group & low, group >> 32, row & low, row >> 32]
    k = [seed & low, (seed >> 32) & low]
    for _ in range(rounds):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def test_philox_matches_the_published_vectors():
    # Known answers of Random123 (philox4x32, 7 rounds; counter and key all zero, then all ones).
    assert philox_numpy(0, 0, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -(2**63), -7, 0x123456789ABCDEF0])
@pytest.mark.parametrize("shape", [(3, 17), (2, 8), (5, 1)])
def test_bits_are_philox_words(seed, shape):
    p = 0.3
    mask = dropout_mask(*shape, p, seed)
    for i in range(shape[0]):
        for j in range(shape[1]):
            word = philox_numpy(seed % 2**64, i, j >> 3)[(j & 7) >> 1]
            if j & 1:
                word = ((word << 16) | (word >> 16)) & 0xFFFFFFFF
            assert bool(mask[i, j]) == (word >= int(p * 2**32))


def test_bits_depend_on_seed_row_and_column_only():
    whole = dropout_mask(40, 300, 0.5, 7)
    for rows, columns in [(1, 300), (40, 1), (13, 77), (40, 299)]:
        assert torch.equal(dropout_mask(rows, columns, 0.5, 7), whole[:rows, :columns])
    assert not torch.equal(dropout_mask(40, 300, 0.5, 8), whole)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_law(p):
    M, K = 2500, 4000
    mask = dropout_mask(M, K, p, 1234).numpy()
    kept, n, q = mask.mean(), mask.size, 1 - p
    assert abs(kept - q) < 5 * math.sqrt(p * q / n)
    # Every row and every column follows the same law: the worst of n binomials stays within 6 sigma.
    for axis, size in ((0, M), (1, K)):
        z = (mask.sum(axis=axis) - size * q) / math.sqrt(size * p * q)
        assert np.abs(z).max() < (6 if p < 0.99 else 8)
    # Neighbours in both directions, and at the distance of a Philox group, are uncorrelated.
    centred = (mask - q) / math.sqrt(p * q)
    for lag in (1, 2, 4, 8, 16, 64):
        for a, b in ((centred[:, :-lag], centred[:, lag:]), (centred[:-lag], centred[lag:])):
            assert abs((a * b).mean()) < 5 / math.sqrt(a.size)


def test_different_seeds_are_independent():
    p = 0.5
    a, b = (dropout_mask(1000, 1000, p, s).double() - 0.5 for s in (5, 6))
    assert abs((a * b).mean() * 4) < 5e-3


def test_p_zero_keeps_all_and_threshold_is_exact():
    assert dropout_mask(3, 5, 0.0, 1).all()
    assert threshold(0.0) == 0 and threshold(0.5) == 2**31 and threshold(1 - 2**-53) == 2**32 - 1


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(shape):
    assert dropout_mask(*shape, 0.5, 1).shape == shape


def test_seed_tensor_equals_int():
    assert torch.equal(dropout_mask(4, 9, 0.5, torch.tensor([-3])), dropout_mask(4, 9, 0.5, 2**64 - 3))


@pytest.mark.parametrize(
    "args, error, word",
    [
        ((2, 3, 1.0, 0), ValueError, "p "),
        ((2, 3, -0.1, 0), ValueError, "p "),
        ((2, 3, float("nan"), 0), ValueError, "p "),
        ((2, 3, "0.1", 0), TypeError, "p "),
        ((-1, 3, 0.1, 0), ValueError, "M"),
        ((2, 3, 0.1, None), TypeError, "seed"),
        ((2, 3, 0.1, 1.5), TypeError, "seed"),
        ((2, 3, 0.1, torch.tensor([1, 2])), ValueError, "seed"),
        ((2, 3, 0.1, torch.tensor([1.0])), TypeError, "seed"),
    ],
)
def test_bad_input(args, error, word):
    with pytest.raises(error, match=word):
        dropout_mask(*args)


def test_opcheck_and_compile():
    seed = torch.tensor([3])
    torch.library.opcheck(torch.ops.peftkern.dropout_mask, (seed, 4, 9, 0.5))
    compiled = torch.compile(lambda s: torch.ops.peftkern.dropout_mask(s, 4, 9, 0.5), fullgraph=True)
    assert torch.equal(compiled(seed), dropout_mask(4, 9, 0.5, 3))

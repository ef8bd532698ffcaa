"""Populations: the shares they are named after, whole, repeatable, and ranks that mix."""

from __future__ import annotations

import pytest
import torch

from peftkern.benchmarks.core.populations import MIXES, adapter_ids, adapter_ranks, shares


def _rows(mix, adapters, M, base_share=0.0):
    return torch.bincount(adapter_ids(mix, adapters, M, base_share).long() + 1, minlength=adapters + 1).tolist()


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    "adapters, M, base_share", [(1, 1, 0.0), (8, 512, 0.5), (5, 7, 0.3), (32, 32, 1.0), (64, 9, 0)]
)
def test_every_row_has_a_place(mix, adapters, M, base_share):
    ids = adapter_ids(mix, adapters, M, base_share)
    assert ids.dtype == torch.int32 and ids.shape == (M,)
    assert ids.min() >= -1 and ids.max() < adapters
    assert (ids == -1).sum() == round(base_share * M)
    assert torch.equal(ids, adapter_ids(mix, adapters, M, base_share))
    assert sum(shares(mix, adapters)) == pytest.approx(1)


def test_shares_by_hand():
    assert _rows("distinct", 32, 32) == [0] + [1] * 32
    assert _rows("uniform", 8, 512) == [0] + [64] * 8
    assert _rows("identical", 4, 10) == [0, 10, 0, 0, 0]
    assert _rows("skewed", 6, 100) == [0, 90, 2, 2, 2, 2, 2]
    assert _rows("zipf", 3, 11) == [0, 6, 3, 2]
    assert _rows("uniform", 4, 100, 0.5) == [50, 13, 13, 12, 12]


def test_neighbours_differ_in_distinct_and_rows_are_mixed_elsewhere():
    ids = adapter_ids("distinct", 8, 64, 0.0)
    assert (ids[1:] != ids[:-1]).all()
    runs = 1 + (adapter_ids("uniform", 8, 512, 0.0).diff() != 0).sum()
    assert runs > 300


def test_base_rows_are_spread():
    base = (adapter_ids("uniform", 8, 512, 0.5) == -1).float()
    assert (base.view(32, 16).mean(1) == 0.5).all()


def test_ranks():
    assert adapter_ranks("same", 16, 3) == (16, 16, 16)
    mixed = adapter_ranks("mixed", 64, 7)
    assert mixed == (64, 32, 16, 19, 8, 64, 32)
    assert min(adapter_ranks("mixed", 1, 9)) == 1


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="mix is 'even'"):
        adapter_ids("even", 2, 3, 0.0)
    with pytest.raises(ValueError, match="ranks is 'odd'"):
        adapter_ranks("odd", 2, 3)

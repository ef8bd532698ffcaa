"""A list of adapters against a bank of the same, whose B lie the other way."""

from __future__ import annotations

import pytest
import torch

from peftkern import AdapterBank, sgmv

K = 24
COUNTS = (1, 2, 3, 4, 5, 6, 9)  # rows of an adapter: up to six have kernels of their own
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", (1, 7, 16, 33, 64, 70))
@pytest.mark.parametrize("columns", (5, 37, 64, 1100))
def test_a_list_has_the_bits_of_a_bank(dtype, rank, columns):
    listed = [
        (torch.randn(rank, K).to(dtype), torch.randn(columns, rank).to(dtype), 0.5 + i) for i in range(len(COUNTS))
    ]
    ids = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    bank = AdapterBank(K, columns, max_adapters=len(COUNTS), max_rank=rank, dtype=dtype)
    numbers = torch.tensor([bank.add(str(i), *each) for i, each in enumerate(listed)])
    x = torch.randn(len(ids), K).to(dtype)
    got = sgmv(x, listed, ids)
    assert torch.equal(got, sgmv(x, bank, numbers[ids]))
    rows = [
        s * (B.double() @ (A.double() @ row.double()))
        for row, (A, B, s) in zip(x, (listed[a] for a in ids.tolist()), strict=True)
    ]
    want = torch.stack(rows)
    # Half precision: the one rounding of y. fp32: chains of 24 and 70 products.
    bound = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    assert (got.double() - want).abs().max() <= bound * want.abs().max()

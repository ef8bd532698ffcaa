"""sgmv_add: the branch added in place."""

from __future__ import annotations

import pytest
import torch

from peftkern import sgmv
from peftkern.ops.adapter_table import table_row

ops = torch.ops.peftkern


def adapters(K=20, N=13, ranks=(3, 1, 7), dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(R, K, generator=g).to(dtype), torch.randn(N, R, generator=g).to(dtype), 0.5 + R) for R in ranks
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_adds_the_branch_and_leaves_base_rows_alone(dtype):
    listed, x = adapters(dtype=dtype), torch.randn(2, 4, 20).to(dtype)
    ids = torch.tensor([[0, -1, 2, 0], [2, 2, -1, 1]])
    before = torch.randn(2, 4, 13).to(dtype)
    out = before.clone()
    assert sgmv(x, listed, ids, out=out) is out
    delta = torch.zeros(2, 4, 13, dtype=torch.float64)
    for slot, (A, B, s) in enumerate(listed):
        delta[ids == slot] = s * x[ids == slot].double() @ A.double().T @ B.double().T
    torch.testing.assert_close(out.double(), before.double() + delta, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5,
                               atol=1e-1 if dtype == torch.bfloat16 else 1e-4)  # fmt: skip
    assert torch.equal(out[ids == -1], before[ids == -1])
    alone = sgmv(x, listed, ids)
    assert not alone[ids == -1].any() and alone.dtype == dtype
    torch.testing.assert_close(alone.double(), delta, rtol=1e-2, atol=1e-1 if dtype == torch.bfloat16 else 1e-4)


def test_out_must_fit_and_needs_no_gradient():
    listed, x, ids = adapters(), torch.randn(4, 20), torch.tensor([0, 1, 2, -1])
    for out in (torch.zeros(4, 12), torch.zeros(3, 13), torch.zeros(4, 13, dtype=torch.float64)):
        with pytest.raises(ValueError, match="out is"):
            sgmv(x, listed, ids, out=out)
    with pytest.raises(RuntimeError, match="in place"):
        sgmv(x.requires_grad_(), listed, ids, out=torch.zeros(4, 13))
    with pytest.raises(ValueError, match="empty"):
        sgmv(x, [], ids)


def test_rows_of_out_may_have_a_gap():
    listed, x, ids = adapters(), torch.randn(4, 20), torch.tensor([0, 1, 2, -1])
    block = torch.full((4, 20), 7.0)
    sgmv(x, listed, ids, out=block[:, :13])
    torch.testing.assert_close(block[:, :13], 7.0 + sgmv(x, listed, ids))
    assert (block[:, 13:] == 7.0).all()


def test_opcheck():
    x, out, ids = torch.randn(4, 20), torch.randn(4, 13), torch.tensor([0, 1, 2, -1])
    weights = [m for A, B, _ in adapters() for m in (A, B)]
    table = torch.tensor([table_row(i, R, 2 * i, 0, 20, 2 * i + 1, 0, R, 1, 0) for i, R in enumerate((3, 1, 7))])
    order, starts = ops.multi_lora_linear_route(ids, table, 2**31 - 1)
    torch.library.opcheck(ops.sgmv_add.default, (out, x, weights, table, torch.ones(3), 7, order, starts))

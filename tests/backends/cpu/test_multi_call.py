"""multi_lora_linear's native calls: what is never stale, what is not taken, the columns of a table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftkern import AdapterBank, multi_lora_linear, sgmv
from peftkern.backends.cpu import call, multi_call, native
from peftkern.many.table import AdapterTable, table_of
from peftkern.ops.adapter_table import COLUMNS

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

M, K, N = 7, 20, 13
IDS = torch.tensor([0, 2, -1, 1, 0, 2, 2])


def adapters(dtype=torch.float32) -> list[tuple[Tensor, Tensor, float]]:
    return [(torch.randn(R, K).to(dtype), torch.randn(N, R).to(dtype), 0.5 + i) for i, R in enumerate((3, 1, 4))]


def expected(x: Tensor, W: Tensor, listed) -> Tensor:
    y = x.double() @ W.double().t()
    for row, slot in enumerate(IDS.tolist()):
        if slot >= 0:
            A, B, s = listed[slot]
            y[row] += s * (B.detach().double() @ (A.detach().double() @ x[row].double()))
    return y


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_the_columns_of_a_table_are_those_of_the_native_code():
    assert len(COLUMNS) == native._C.multi_columns


@pytest.mark.parametrize("grad", (False, True))
def test_a_table_sees_data_that_was_exchanged(grad):
    """The same Parameters with other memory, strides or dtype: what they hold now counts, in both passes."""
    listed = [(torch.nn.Parameter(A, grad), torch.nn.Parameter(B, grad), s) for A, B, s in adapters()]
    x, W = torch.randn(M, K), torch.randn(N, K)
    table = table_of(listed, x, x.dtype)

    def check() -> None:
        y = multi_lora_linear(x, W, table, IDS)
        close(y, expected(x, W, listed))
        if not grad:
            return
        y.sum().backward()
        found = [w.grad for A, B, _ in listed for w in (A, B)]
        copies = [(A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_(), s) for A, B, s in listed]
        multi_lora_linear(x, W, copies, IDS).sum().backward()
        torch.testing.assert_close(found, [w.grad for A, B, _ in copies for w in (A, B)])
        for A, B, _ in listed:
            A.grad = B.grad = None

    check()
    listed[0][0].data = torch.randn(3, K)
    check()
    listed[2][1].data = torch.randn(4, N).t()
    check()
    listed[1][0].data = torch.randn(1, 2 * K)[:, ::2]
    check()


def test_a_bank_may_grow_and_change_between_calls():
    bank, listed = AdapterBank(K, N, max_adapters=600, max_rank=300), adapters()
    for i, each in enumerate(listed):
        bank.add(f"a{i}", *each)
    ids = bank.ids([None if i < 0 else f"a{i}" for i in IDS.tolist()])
    x, W = torch.randn(M, K), torch.randn(N, K)
    close(multi_lora_linear(x, W, bank, ids), expected(x, W, listed))
    for i in range(20):  # into further chunks
        bank.add(f"b{i}", torch.randn(300, K), torch.randn(N, 300))
    assert len(bank.snapshot().weights) > 1
    listed[0] = (torch.randn(290, K), torch.randn(N, 290), 0.1)
    bank.replace("a0", *listed[0])
    close(multi_lora_linear(x, W, bank, ids), expected(x, W, listed))
    out = torch.zeros(M, N)
    sgmv(x, bank, ids, out=out)
    close(out, expected(x, torch.zeros(N, K), listed))


def known(table: AdapterTable, x: Tensor, W: Tensor, order: Tensor, starts: Tensor):
    """A call that was looked at, and a way to make it again with other arguments."""
    settings = object()
    good = dict(
        threads=1, x=x, kind="dense", weight=W, bias=None, given=table.native(), order=order, starts=starts,
        dropout_p=None, seed=None, want_u=False, want_h=False,
    )  # fmt: skip

    def again(**changes):
        return multi_call.forward(settings, *(good | changes).values())

    assert again() is None
    assert multi_call.learn_forward(settings, *good.values(), "panels") is True
    return again


def test_what_is_not_ordinary_is_not_taken():
    listed, x, W = adapters(), torch.randn(M, K), torch.randn(N, K)
    table = table_of(listed, x, x.dtype)
    order, starts = torch.ops.peftkern.multi_lora_linear_route(IDS, table.table, table.mask)
    again = known(table, x, W, order, starts)
    close(again(), expected(x, W, listed))
    p = torch.zeros(3, dtype=torch.float64)
    for change in (
        dict(threads=0), dict(x=x.double()), dict(x=x[:, 1:]), dict(x=x.to("meta")), dict(x=torch._neg_view(x)), dict(x=None),
        dict(kind="sparse"), dict(kind=None), dict(kind="identity"), dict(weight=None), dict(weight=W[1:]),
        dict(weight=W.bfloat16()), dict(bias=torch.zeros(N + 1)), dict(bias=torch.zeros(N, dtype=torch.bfloat16)),
        dict(given=None), dict(given=False), dict(order=order[1:]), dict(order=order.long()), dict(order=order.float()),
        dict(starts=starts[1:]), dict(dropout_p=p[1:], seed=torch.tensor([1])), dict(dropout_p=p, seed=None),
        dict(dropout_p=p.float(), seed=torch.tensor([1])), dict(threads=2), dict(x=x[:3], order=order[:3]),
    ):  # fmt: skip
        assert again(**change) is None, change
    close(again(), expected(x, W, listed))
    assert again(starts=starts.clone()) is not None
    with pytest.raises(ValueError, match="starts"):
        again(starts=torch.full_like(starts, 99))
    mixed = [listed[0][0].bfloat16(), *(w for A, B, _ in listed for w in (A, B))][: len(table.weights)]
    assert again(given=table.given(mixed, ())) is None, "weights of several dtypes"


def test_tables_of_wrong_kinds_are_not_read():
    x = torch.randn(M, K)
    t = table_of(adapters(), x, x.dtype)
    sizes = (t.max_rank, K, N, True, [])
    for table, scaling in (
        (t.table.int(), t.scaling), (t.table[:, :-1], t.scaling), (t.table, t.scaling.double()), (t.table, t.scaling[1:]),
        (t.table.flatten(), t.scaling), (None, t.scaling), (t.table, None),
    ):  # fmt: skip
        assert multi_call.adapters(t.weights, table, scaling, *sizes) is None
    assert multi_call.adapters([w.double() for w in t.weights], t.table, t.scaling, *sizes) is None
    assert multi_call.adapters(t.weights, t.table, t.scaling, -1, K, N, True, []) is None
    with pytest.raises(TypeError):
        multi_call.adapters(3, t.table, t.scaling, *sizes)

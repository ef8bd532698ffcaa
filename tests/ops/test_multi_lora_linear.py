"""multi_lora_linear's ops: the reference against one lora_linear per adapter, schemas, routes, bad input."""

from __future__ import annotations

import pytest
import torch

from peftkern import lora_linear
from peftkern.ops.adapter_table import COLUMNS, FREE, table_row

ops = torch.ops.peftkern
EVERY_ID = 2**31 - 1


def problem(M=11, K=20, N=13, ranks=(3, 1, 7, 2), dtype=torch.float64, seed=0):
    """x, weight, weights, table, scaling, ids with -1 among them and the last adapter without rows."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    weights = [m for R in ranks for m in (normal(R, K), normal(N, R))]
    table = torch.tensor([table_row(i, R, 2 * i, 0, K, 2 * i + 1, 0, R, 1, 0) for i, R in enumerate(ranks)])
    scaling = torch.linspace(0.5, 2.0, len(ranks), dtype=torch.float64)
    ids = torch.randint(-1, len(ranks) - 1, (M,), generator=g)
    return normal(M, K), normal(N, K), weights, table, scaling, ids


def test_route_is_a_stable_sort_with_base_rows_last():
    table = problem()[3]
    ids = torch.tensor([2, -1, 0, 2, -1, 0, 3], dtype=torch.int32)
    order, starts = ops.multi_lora_linear_route(ids, table, EVERY_ID)
    assert order.tolist() == [2, 5, 0, 3, 6, 1, 4] and order.dtype == torch.int32
    assert starts.tolist() == [0, 2, 2, 4, 5, 7, 7]


def test_route_of_no_rows_and_of_base_rows_alone():
    table = problem()[3]
    order, starts = ops.multi_lora_linear_route(torch.empty(0, dtype=torch.int64), table, EVERY_ID)
    assert order.numel() == 0 and starts.tolist() == [0] * 7
    order, starts = ops.multi_lora_linear_route(torch.full((3,), -1), table, EVERY_ID)
    assert order.tolist() == [0, 1, 2] and starts.tolist() == [0, 0, 0, 0, 0, 3, 3]


@pytest.mark.parametrize("bad", [4, -2, FREE, 2**31 - 1, 2**40])
def test_route_refuses_ids_that_no_slot_answers_to(bad):
    with pytest.raises(ValueError, match=f"adapter_ids holds {bad}"):
        ops.multi_lora_linear_route(torch.tensor([0, bad]), problem()[3], EVERY_ID)


def test_route_refuses_free_slots_and_old_generations():
    table = problem()[3].clone()
    table[1, 0], table[2, 0] = FREE, 4 * 5 + 2
    assert ops.multi_lora_linear_route(torch.tensor([22]), table, 3)[1].tolist() == [0, 0, 0, 1, 1, 1, 1]
    for bad in (1, 2, 6):
        with pytest.raises(ValueError, match="adapter_ids"):
            ops.multi_lora_linear_route(torch.tensor([bad]), table, 3)


@pytest.mark.parametrize("p", [None, (0.0, 0.3, 0.5, 0.0)], ids=["plain", "dropout"])
def test_reference_equals_one_lora_linear_per_adapter(p, monkeypatch):
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")
    x, W, weights, table, scaling, ids = problem()
    M, (N, K) = x.shape[0], W.shape
    probabilities, seed = (None, None) if p is None else (torch.tensor(p, dtype=torch.float64), torch.tensor([9]))
    bias = torch.randn(N, dtype=torch.float64)
    route = ops.multi_lora_linear_route(ids, table, EVERY_ID)
    y, u, _ = ops.multi_lora_linear_fwd(
        x, [W], "dense", N, bias, weights, table, scaling, 7, *route, probabilities, seed
    )
    dy = torch.randn(M, N, dtype=torch.float64)
    dx, dbias, grads, _ = ops.multi_lora_linear_bwd(
        dy, x, u, [W], "dense", K, weights, table, scaling, *route, probabilities, seed, True, True, [True] * len(weights)
    )  # fmt: skip
    torch.testing.assert_close(dbias, dy.sum(0))
    for slot in range(-1, len(scaling)):
        # The whole batch through one adapter: the bits of a row's dropout depend on its place.
        leaf = x.clone().requires_grad_()
        A, B = (w.clone().requires_grad_() for w in weights[2 * slot : 2 * slot + 2]) if slot >= 0 else (
            torch.empty(0, K, dtype=x.dtype), torch.empty(N, 0, dtype=x.dtype))  # fmt: skip
        rate = p[slot] if p is not None and slot >= 0 else 0.0
        expected = lora_linear(
            leaf, W, A, B, bias=bias, scaling=scaling[slot].item(), dropout_p=rate, training=True, seed=9
        )
        mine = ids == slot
        torch.testing.assert_close(y[mine], expected[mine].detach())
        expected.backward(torch.where(mine[:, None], dy, 0.0))
        torch.testing.assert_close(dx[mine], leaf.grad[mine])
        if slot >= 0:
            torch.testing.assert_close(grads[2 * slot], A.grad)
            torch.testing.assert_close(grads[2 * slot + 1], B.grad)
            assert not u[mine][:, A.shape[0] :].any()
    assert not grads[-1].any() and not grads[-2].any(), "the last adapter has no rows"


def test_weights_may_lie_anywhere_in_shared_tensors():
    x, W, weights, table, scaling, ids = problem()
    (N, K), route = W.shape, ops.multi_lora_linear_route(ids, table, EVERY_ID)
    expected = ops.multi_lora_linear_fwd(x, [W], "dense", N, None, weights, table, scaling, 7, *route, None, None)
    # One tensor of NaN with A in rows of 32 columns and B transposed, in rows of 16.
    pool, rows, at = torch.full((4000,), float("nan"), dtype=x.dtype), [], 5
    for slot, (A, B) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
        R = A.shape[0]
        pool[at : at + 32 * R].view(R, 32)[:, :K] = A
        pool[at + 32 * R : at + 48 * R].view(R, 16)[:, :N] = B.t()
        rows.append(table_row(slot, R, 0, at, 32, 0, at + 32 * R, 1, 16, 0))
        at += 48 * R + 3
    found = ops.multi_lora_linear_fwd(
        x, [W], "dense", N, None, [pool], torch.tensor(rows), scaling, 7, *route, None, None
    )
    torch.testing.assert_close(found, expected)


def test_opcheck():
    x, W, weights, table, scaling, ids = problem(dtype=torch.float32)
    scaling, (N, K), seed = scaling.float(), W.shape, torch.tensor([4])
    p = torch.full((4,), 0.25, dtype=torch.float64)
    torch.library.opcheck(ops.multi_lora_linear_route.default, (ids, table, EVERY_ID))
    order, starts = ops.multi_lora_linear_route(ids, table, EVERY_ID)
    args = (x, [W], "dense", N, torch.zeros(N), weights, table, scaling, 7, order, starts, p, seed)
    torch.library.opcheck(ops.multi_lora_linear_fwd.default, args)
    y, u, _ = ops.multi_lora_linear_fwd(*args)
    need = [True, False] * 4
    rest = ([W], "dense", K, weights, table, scaling, order, starts, p, seed)
    for wanted in ((True, True, need), (False, False, [False] * 8)):
        torch.library.opcheck(ops.multi_lora_linear_bwd.default, (torch.ones_like(y), x, u, *rest, *wanted))


def test_bad_arguments_are_named():
    x, W, weights, table, scaling, ids = problem()
    N, (order, starts) = W.shape[0], ops.multi_lora_linear_route(ids, table, EVERY_ID)
    good = dict(x=x, base=[W], kind="dense", out_features=N, bias=None, weights=weights, table=table, scaling=scaling, max_rank=7,
                order=order, starts=starts, dropout_p=None, seed=None)  # fmt: skip
    bad = dict(
        x=x[0], base=[W[:-1]], kind="sparse", bias=torch.zeros(N + 1), weights=[*weights[:-1], weights[-1].float()],
        table=table[:, :-1], scaling=scaling[:-1], order=order.long(), starts=starts[:-1],
        dropout_p=torch.zeros(3, dtype=torch.float64),
    )  # fmt: skip
    for name, value in bad.items():
        with pytest.raises((ValueError, TypeError), match={"base": "weight"}.get(name, name)):
            ops.multi_lora_linear_fwd(*(good | {name: value}).values())
    assert len(COLUMNS) == table.shape[1]

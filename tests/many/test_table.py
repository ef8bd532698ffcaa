"""The table of a list that the extension checks is the one that Python makes; what is not ordinary is left to Python."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch

from peftkern import Adapter, sgmv
from peftkern.backends.cpu import call, multi_call
from peftkern.many.table import table_of

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

K, N = 24, 37
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pairs(dtype=torch.float32, ranks=(3, 1, 4)):
    return [(torch.randn(R, K).to(dtype), torch.randn(N, R).to(dtype), 0.5 + i) for i, R in enumerate(ranks)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_list_that_the_extension_checks_has_the_table_that_python_makes(dtype, monkeypatch):
    listed, x = pairs(dtype), torch.randn(2, K).to(dtype)
    assert multi_call.adapter_list(listed, K, dtype) is not None
    fast = table_of(listed, x, dtype)
    monkeypatch.setattr(multi_call, "adapter_list", lambda *args: None)
    slow = table_of(listed, x, dtype)
    for t in (fast, slow):
        assert all(a is b for a, b in zip(t.weights, [w for A, B, _ in listed for w in (A, B)], strict=True))
    assert torch.equal(fast.table, slow.table) and torch.equal(fast.scaling, slow.scaling)
    for name in ("max_rank", "in_features", "out_features", "slots", "mask", "fixed", "vectors", "acting", "beside"):
        assert getattr(fast, name) == getattr(slow, name), name


def test_what_changed_in_a_list_counts_at_the_next_call():
    listed, x, ids = pairs(), torch.randn(3, K), torch.tensor([0, 1, 2])
    sgmv(x, listed, ids)
    A, B = torch.randn(5, K), torch.randn(N, 5)
    listed[1] = (A, B, 3.0)
    listed[2][0].data = torch.randn(4, K)
    y = sgmv(x, listed, ids)
    for row, (a, b, s) in enumerate(listed):
        want = s * (b.double() @ (a.double() @ x[row].double()))
        torch.testing.assert_close(y[row].double(), want, rtol=1e-5, atol=1e-5)


class Sub(torch.Tensor):
    pass


class Pair(tuple):
    pass


def put(i, *pair):
    return lambda listed: listed.__setitem__(i, pair)


A, B = torch.randn(3, K), torch.randn(N, 3)
ORDINARY = {
    "as it was": lambda listed: None,
    "int": put(0, A, B, 2),
    "parameters": put(1, torch.nn.Parameter(A), B.clone().requires_grad_(), 1.0),
    "views": put(1, torch.randn(5, K)[1:4], torch.randn(2, N, 3)[1], 1.0),
    "a row of any stride": put(1, torch.randn(2, K)[::2], torch.randn(N, 1), 1.0),
    "negated": put(1, torch._neg_view(A), torch._neg_view(B), 1.0),
    "rank 0": put(2, torch.empty(0, K), torch.empty(N, 0), 1.0),
    "twice": lambda listed: listed.append(listed[0]),
}
LEFT = {
    "bool": put(0, A, B, True),
    "nan": put(0, A, B, float("nan")),
    "infinity": put(0, A, B, float("inf")),
    "too large an int": put(0, A, B, 10**400),
    "a string": put(0, A, B, "1.0"),
    "a tensor": put(0, A, B, torch.tensor(1.0)),
    "rows of B": put(1, A, torch.randn(N + 1, 3), 1.0),
    "rank": put(1, A, torch.randn(N, 2), 1.0),
    "columns of A": put(1, torch.randn(3, K + 1), B, 1.0),
    "dimensions": put(1, A[None], B, 1.0),
    "other dtypes": put(1, A.bfloat16(), B.bfloat16(), 1.0),
    "two dtypes": put(1, A, B.bfloat16(), 1.0),
    "fp64": put(1, A.double(), B.double(), 1.0),
    "integers": put(1, A.int(), B.int(), 1.0),
    "turned": put(1, torch.randn(K, 3).t(), B, 1.0),
    "columns of more": put(1, torch.randn(3, 2 * K)[:, :K], B, 1.0),
    "another device": put(1, A, B.to("meta"), 1.0),
    "a subclass": put(1, A.as_subclass(Sub), B, 1.0),
    "sparse": put(1, A.to_sparse(), B, 1.0),
    "no tensor": put(1, A, 2, 1.0),
    "no B": put(1, A, None, 1.0),
    "neither": put(1, None, None, 1.0),
    "two": put(1, A, B),
    "four": put(1, A, B, 1.0, 1.0),
    "a list": lambda listed: listed.__setitem__(1, [A, B, 1.0]),
    "a tuple of its own": lambda listed: listed.__setitem__(1, Pair((A, B, 1.0))),
    "an Adapter": lambda listed: listed.__setitem__(1, Adapter(A, B, 1.0)),
    "nothing": list.clear,
}


def outcome(listed, x):
    """The fields of the table of a list, or the error."""
    try:
        t = table_of(listed, x, x.dtype)
    except (TypeError, ValueError, OverflowError) as error:
        return type(error), str(error)
    return [w.double().tolist() for w in t.weights], t.table.tolist(), t.scaling.tolist(), t.max_rank, t.slots


@pytest.mark.parametrize("change", [*ORDINARY, *LEFT])
def test_ordinary_or_not_python_says_the_same(change, monkeypatch):
    listed, x = pairs(), torch.randn(2, K)
    (ORDINARY | LEFT)[change](listed)
    assert (multi_call.adapter_list(listed, K, torch.float32) is not None) == (change in ORDINARY)
    mine = outcome(listed, x)
    monkeypatch.setattr(multi_call, "adapter_list", lambda *args: None)
    assert str(mine) == str(outcome(listed, x))  # a NaN is no NaN's equal


@pytest.mark.parametrize("own", DTYPES)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_matrices_in_fp32_or_the_dtype_of_x_are_ordinary(own, dtype):
    taken = multi_call.adapter_list(pairs(own), K, dtype) is not None
    assert taken == (dtype in DTYPES and own in (dtype, torch.float32))
    assert multi_call.adapter_list(tuple(pairs(own)), K, own) is not None
    assert multi_call.adapter_list(pairs(own), K + 1, own) is None


def test_gradients_reach_the_matrices_of_an_ordinary_list():
    listed, x, ids = pairs(), torch.randn(3, K), torch.tensor([2, 0, 2])
    for pair in listed:
        for w in pair[:2]:
            w.requires_grad_()
    assert multi_call.adapter_list(listed, K, torch.float32) is not None
    sgmv(x, listed, ids).sum().backward()
    mine = [w.grad for pair in listed for w in pair[:2]]
    for pair in listed:
        for w in pair[:2]:
            w.grad = None
    sum((s * (a @ row)) @ b.sum(0) for row, (a, b, s) in zip(x, (listed[i] for i in ids.tolist()))).backward()
    for got, want in zip(mine, [w.grad for pair in listed for w in pair[:2]], strict=True):
        assert want is None or torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_of_a_list():
    listed = pairs()
    held = [w for pair in listed for w in pair[:2]]
    before = [sys.getrefcount(each) for each in (listed, *listed, *held)]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for _ in range(100):
            multi_call.adapter_list(listed, K, dtype)
    assert [sys.getrefcount(each) for each in (listed, *listed, *held)] == before


def test_who_watches_sees_a_list_walked_in_python(monkeypatch):
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    seen = []
    monkeypatch.setattr(multi_call, "adapter_list", lambda *args: seen.append(args))
    with Mode():
        table_of(pairs(), torch.randn(2, K), torch.float32)
    assert not seen
    table_of(pairs(), torch.randn(2, K), torch.float32)
    assert len(seen) == 1


def test_a_list_may_change_while_others_read_it():
    """Every table is that of a whole list, before or after a change."""
    sizes = [pairs(ranks=(R,) * count) for R, count in ((1, 1), (2, 40), (3, 200), (5, 3))]
    listed, stop, wrong = list(sizes[0]), threading.Event(), []

    def change():
        i = 0
        while not stop.is_set():
            i += 1
            listed[:] = sizes[i % len(sizes)]

    def read():
        while not stop.is_set():
            known = multi_call.adapter_list(listed, K, torch.float32)
            if known is None or len(set(known[1])) != 1 or len(known[0]) != 2 * len(known[1]):
                wrong.append(known)

    threads = [threading.Thread(target=each) for each in (change, read, read)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


class _Emptied(dict):
    """Between any two lines another thread may have cleared it."""

    def __contains__(self, key):
        found = super().__contains__(key)
        self.clear()
        return found

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.clear()


def test_constants_that_another_thread_clears(monkeypatch):
    x = torch.randn(2, K)
    monkeypatch.setattr("peftkern.many.table._constants", _Emptied())
    for _ in range(2):
        made = table_of([Adapter(A, B, s) for A, B, s in pairs()], x, x.dtype)
        assert made.scaling.tolist() == [0.5, 1.5, 2.5]

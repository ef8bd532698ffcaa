"""Pool: equal contents are one tensor, as long as somebody holds it."""

import gc
import weakref

import torch

from peftkern.many.bank import AdapterBank
from peftkern.many.pool import Pool

CPU = torch.device("cpu")


def test_equal_contents_are_one_tensor():
    pool, t = Pool(), torch.randn(5, 7)
    first = pool.get(t, CPU, torch.float32)
    assert pool.get(t.clone(), CPU, torch.float32) is first and torch.equal(first, t)
    assert pool.get(t.t().contiguous().t(), CPU, torch.float32) is first  # however they lie in memory
    # The caller's tensor may change: it is not the pool's.
    t[0, 0] += 1
    other = pool.get(t, CPU, torch.float32)
    assert other is not first and first[0, 0] == t[0, 0] - 1
    half = pool.get(first.bfloat16(), CPU, torch.float32)
    assert half is not first and half.dtype == torch.float32
    assert pool.get(first, CPU, torch.float64).dtype == torch.float64
    assert pool.get(first.view(7, 5), CPU, torch.float32).shape == (7, 5)


def test_nothing_is_kept_that_nobody_holds():
    pool, t = Pool(), torch.randn(5, 7)
    gone = weakref.ref(pool.get(t, CPU, torch.float32))
    gc.collect()
    assert gone() is None
    assert torch.equal(pool.get(t, CPU, torch.float32), t)


def test_a_bank_stores_them_once():
    pool, A, B = Pool(), torch.randn(4, 9), torch.randn(8, 4)
    bank = AdapterBank(6, 5, max_adapters=3, max_rank=4)
    held = []
    for name in "abc":
        shared = [pool.get(t.clone(), CPU, torch.float32) for t in (A, B)]
        held += shared
        bank.add(name, shared[0][:, :6], shared[1][:5], rank_scale=torch.randn(4))
    assert len(bank.pairs) == 1 and len(held) == 6

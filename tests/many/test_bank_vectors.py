"""AdapterBank with vectors: matrices that several adapters share, and memory that is used again only when unread."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from peftkern import Adapter, AdapterBank, multi_lora_linear
from peftkern.ops.adapter_table import matrix_A

SECONDS = float(os.environ.get("PEFTKERN_RACE_SECONDS", "3"))
NAN = float("nan")
K, N = 20, 13


def adapter(rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rank, K, generator=g), torch.randn(N, rank, generator=g)


def vera(i: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(i)
    return dict(rank_scale=torch.randn(5, generator=g), delta_out_scale=torch.randn(N, generator=g))


def test_matrices_that_adapters_share_are_stored_once():
    bank = AdapterBank(K, N, max_adapters=300, max_rank=8)
    A, B = adapter(5, 0)
    whole, x, W = torch.cat([A, A]), torch.randn(4, K), torch.randn(N, K)
    bank.add("v0", A, B, 2.0, **vera(0))
    used = bank.nbytes
    for i in range(1, 250):
        bank.add(f"v{i}", A, B, 2.0, **vera(i))
    matrices = 249 * 5 * (K + N) * bank.dtype.itemsize
    assert bank.nbytes - used < 0.7 * matrices, "a further one costs its vectors"
    pairs = {tuple(row[2:9].tolist()) for row in bank.snapshot().table if row[0] >= 0}
    assert len(pairs) == 1
    # A view made anew is the same memory; equal numbers elsewhere are another matter.
    bank.add("view", A[:], B[:, :5], 2.0, **vera(1))
    bank.add("other", whole[:5], B, 2.0, **vera(1))
    rows = bank.snapshot().table[bank.ids(["v0", "view", "other"]).long(), 2:9].tolist()
    assert rows[0] == rows[1] != rows[2]
    listed = [Adapter(A.clone(), B.clone(), 2.0, **vera(i)) for i in (0, 249, 1)]
    before = multi_lora_linear(x, W, listed, torch.tensor([0, 1, 2, -1]))
    # What the caller changes in place later changes none of those that are there, and makes a copy of its own.
    A.mul_(2.0)
    bank.add("changed", A, B, 2.0, **vera(0))
    names = ["v0", "v249", "view", None]
    torch.testing.assert_close(multi_lora_linear(x, W, bank, bank.ids(names)), before)
    changed = multi_lora_linear(x, W, [Adapter(A, B, 2.0, **vera(0))], torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(multi_lora_linear(x, W, bank, bank.ids(["changed"] * 4)), changed)
    # data_ptr alone would not see this: written past the version counter.
    A.data.mul_(3.0)
    bank.replace("changed", A, B, 2.0, **vera(0))
    changed = multi_lora_linear(x, W, [Adapter(A, B, 2.0, **vera(0))], torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(multi_lora_linear(x, W, bank, bank.ids(["changed"] * 4)), changed)


def poison(bank: AdapterBank, times: int) -> None:
    """Adapters full of NaN come and go."""
    nan = torch.full((5, K), NAN), torch.full((N, 5), NAN)
    for _ in range(times):
        bank.add("poison", *nan, base_out_scale=torch.full((N,), NAN), base_in_scale=torch.full((K,), NAN))
        bank.remove("poison")


def test_shared_matrices_go_with_their_last_adapter():
    bank = AdapterBank(K, N, max_adapters=4, max_rank=8)
    A, B = adapter(5, 0)
    for i in range(3):
        bank.add(f"v{i}", A, B, **vera(i))
    held, number = bank.snapshot(), int(bank.ids(["v2"]))
    shown = matrix_A(held.weights, held.table[number].tolist(), K)
    for name in ("v0", "v1"):
        bank.remove(name)
    poison(bank, 20)
    assert torch.equal(shown, A), "v2 is left"
    bank.remove("v2")
    poison(bank, 20)
    assert torch.equal(shown, A), "a state that shows it is held"
    del held
    size = bank.nbytes
    poison(bank, 1200)  # a chunk has room for about 550
    assert bank.nbytes == size and not shown.isfinite().any()


def test_threads_that_add_remove_and_read_shared_matrices():
    bank, (A, B) = AdapterBank(K, N, max_adapters=8, max_rank=8), adapter(5, 0)
    x, W = torch.randn(1, K), torch.randn(N, K)
    bank.add("stays", A, B, **vera(0))
    ids, stop = bank.ids(["stays"]), time.monotonic() + SECONDS / 3
    want, wrong = multi_lora_linear(x, W, bank, ids), []

    def change(name: str):
        while time.monotonic() < stop:
            bank.add(name, A, B, **vera(1))
            mine = multi_lora_linear(x, W, bank, bank.ids([name]))
            bank.remove(name)
            if not mine.isfinite().all():
                wrong.append(name)

    def read():
        while time.monotonic() < stop:
            if not torch.equal(multi_lora_linear(x, W, bank, ids), want):
                wrong.append("stays")

    def spoil():
        while time.monotonic() < stop:
            poison(bank, 1)

    threads = [threading.Thread(target=f, args=a) for f, a in ((change, "a"), (change, "b"), (read, ()), (spoil, ()))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and bank.names == ["stays"] and len(bank.pairs) == 1


def test_vectors_are_used_again_only_when_nobody_reads_them():
    bank = AdapterBank(K, N, max_adapters=3, max_rank=8)
    A, B = adapter(5, 0)
    x, W = torch.randn(2, K, requires_grad=True), torch.randn(N, K)
    bank.add("a", A, B, base_out_scale=torch.full((N,), 2.0), base_in_scale=torch.full((K,), 0.5))
    y = multi_lora_linear(x, W, bank, bank.ids(["a", None]))
    other = x.detach().clone().requires_grad_()
    want = torch.autograd.grad(multi_lora_linear(other, W, bank, bank.ids(["a", None])).sum(), other)[0]
    bank.remove("a")
    poison(bank, 8)
    y.sum().backward()
    torch.testing.assert_close(x.grad, want)
    # And then they are: the bank does not grow.
    del y
    size = bank.nbytes
    poison(bank, 3000)  # a chunk has room for 2,700
    assert bank.nbytes == size
    assert not bank.snapshot().vectors and bank.snapshot().acting == ""


def test_vectors_that_a_captured_graph_would_leave_out_are_refused(monkeypatch):
    bank, (A, B) = AdapterBank(K, N, max_adapters=4, max_rank=8), adapter(5, 0)
    bank.add("a", A, B, rank_scale=torch.ones(5))
    bank.device = torch.device("cuda")  # what decides; its memory stays where it is
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    bank.snapshot()
    bank.add("b", A, B, rank_scale=torch.ones(5))
    with pytest.raises(RuntimeError, match="captured when no adapter of the bank had g_b"):
        bank.add("c", A, B, base_out_scale=torch.ones(N))
    assert bank.names == ["a", "b"]


def test_coefficients_of_a_bank_are_checked():
    bank = AdapterBank(K, N, max_adapters=2, max_rank=8)
    A, B = adapter(5, 0)
    for bad, error, words in (
        (dict(rank_scale=torch.ones(4)), ValueError, "rank_scale"), (dict(bias=torch.ones(K)), ValueError, "bias"),
        (dict(gain=torch.ones(5)), TypeError, "gain is no coefficient"), (dict(base_in_scale=1.0), TypeError, "base_in_scale"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            bank.add("a", A, B, **bad)
    with pytest.raises(TypeError, match="lora_B is given alone"):
        bank.add("a", None, B)
    assert len(bank) == 0 and not bank.pairs and "a" not in bank

"""AdapterBank: contents, ids, memory, and changes while other threads run."""

from __future__ import annotations

import gc
import random
import threading
import time

import pytest
import torch

from peftkern import AdapterBank, multi_lora_linear, sgmv
from peftkern.chunks import Chunks

K, N = 20, 13


def adapter(rank: int, seed: int, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rank, K, generator=g).to(dtype), torch.randn(N, rank, generator=g).to(dtype)


def bank_of(*ranks: int, max_adapters: int = 4, **kw):
    bank = AdapterBank(K, N, max_adapters=max_adapters, max_rank=8, **kw)
    listed = [(*adapter(r, i), 0.5 + i) for i, r in enumerate(ranks)]
    for i, entry in enumerate(listed):
        bank.add(f"a{i}", *entry)
    return bank, listed


def test_a_bank_gives_what_its_list_gives():
    bank, listed = bank_of(3, 1, 8)
    x, ids = torch.randn(7, K), torch.tensor([0, 2, -1, 1, 0, 0, 2])
    names = [None if i < 0 else f"a{i}" for i in ids.tolist()]
    torch.testing.assert_close(sgmv(x, bank, bank.ids(names)), sgmv(x, listed, ids))
    W = torch.randn(N, K)
    torch.testing.assert_close(multi_lora_linear(x, W, bank, bank.ids(names)), multi_lora_linear(x, W, listed, ids))


def test_names_ids_and_errors():
    bank, _ = bank_of(3, 1)
    assert len(bank) == 2 and "a1" in bank and "b" not in bank and bank.names == ["a0", "a1"]
    assert bank.ids(["a1", None]).dtype == torch.int32 and bank.ids(["a1", None])[1] == -1
    for call in (lambda: bank.ids(["b"]), lambda: bank.remove("b"), lambda: bank.replace("b", *adapter(2, 0))):
        with pytest.raises(KeyError, match="no adapter 'b'"):
            call()
    with pytest.raises(ValueError, match="'a0' is in the bank already"):
        bank.add("a0", *adapter(2, 0))
    A, B = adapter(2, 0)
    bad = [
        (("b", A[:, 1:], B), "lora_A"), (("b", A[0], B), "lora_A"), (("b", A, B[:-1]), "lora_B"),
        (("b", A, B[:, :1]), "lora_B"), (("b", *adapter(9, 0)), "rank 9"), (("b", A[:0], B[:, :0]), "rank 0"),
        ((5, A, B), "name"), (("b", A.long(), B), "lora_A"), (("b", A, "B"), "lora_B"), (("b", A, B, "1"), "scaling"),
    ]  # fmt: skip
    for args, word in bad:
        with pytest.raises((ValueError, TypeError), match=word):
            bank.add(*args)
    assert bank.names == ["a0", "a1"], "a refused adapter leaves nothing behind"
    for kw in (dict(max_adapters=0), dict(max_rank=0), dict(max_rank=1.5), dict(dtype=torch.int8)):
        with pytest.raises((ValueError, TypeError), match=next(iter(kw))):
            AdapterBank(K, N, **(dict(max_adapters=2, max_rank=2) | kw))


def test_a_full_bank_says_so_and_has_room_again():
    bank, _ = bank_of(1, 1, max_adapters=2)
    with pytest.raises(RuntimeError, match="full: 2 of 2"):
        bank.add("more", *adapter(1, 5))
    bank.remove("a0")
    bank.add("more", *adapter(1, 5))


def test_an_old_id_is_never_answered_by_another_adapter():
    bank, _ = bank_of(3, 1, max_adapters=2)
    x, old = torch.randn(2, K), bank.ids(["a1", "a0"])
    sgmv(x, bank, old)
    bank.remove("a1")
    with pytest.raises(ValueError, match="adapter_ids"):
        sgmv(x, bank, old)
    bank.add("new", *adapter(2, 7))
    with pytest.raises(ValueError, match="adapter_ids"):
        sgmv(x, bank, old)


def test_a_slot_ends_with_its_last_generation(monkeypatch):
    bank = AdapterBank(K, N, max_adapters=1, max_rank=2)
    monkeypatch.setattr(bank, "_generations", 3)
    seen = set()
    for i in range(3):
        seen.add(bank.add(f"a{i}", *adapter(1, i)))
        bank.remove(f"a{i}")
    assert len(seen) == 3
    with pytest.raises(RuntimeError, match="full"):
        bank.add("one too many", *adapter(1, 4))


def test_replace_keeps_the_id_and_may_change_the_rank():
    bank, listed = bank_of(3, 1)
    x, ids = torch.randn(2, K), bank.ids(["a0", "a0"])
    listed[0] = (*adapter(6, 9), 2.0)
    bank.replace("a0", *listed[0])
    torch.testing.assert_close(sgmv(x, bank, ids), sgmv(x, listed, torch.zeros(2, dtype=torch.int64)))


def test_what_is_stored_is_a_copy():
    A, B = adapter(3, 0)
    bank = AdapterBank(K, N, max_adapters=1, max_rank=4)
    bank.add("a", A, B)
    x, ids = torch.randn(1, K), bank.ids(["a"])
    before = sgmv(x, bank, ids)
    A.zero_(), B.fill_(float("nan"))
    assert torch.equal(sgmv(x, bank, ids), before)


def test_memory_follows_the_ranks_and_is_used_again():
    ranks = [8 + (i * 7) % 57 for i in range(1000)]
    bank = AdapterBank(256, 512, max_adapters=1000, max_rank=64)
    A, B = torch.zeros(64, 256), torch.zeros(512, 64)
    for i, r in enumerate(ranks):
        bank.add(str(i), A[:r], B[:, :r])
    needed = 4 * sum(ranks) * (256 + 512)
    assert needed <= bank.nbytes <= 1.1 * needed
    for round_ in range(3):
        for i, r in enumerate(ranks):
            bank.remove(str(i)) if round_ % 2 == 0 else bank.add(str(i), A[:r], B[:, :r])
    assert bank.nbytes <= 1.1 * needed


def test_a_call_keeps_what_it_reads():
    bank, listed = bank_of(3, max_adapters=1)
    held = bank.snapshot()
    memory = [t.clone() for t in held.weights]
    for i in range(5):
        bank.replace("a0", *adapter(3, 10 + i))
    for row in held.table.tolist():
        start, size = row[3], row[1] * (32 + 16)
        assert torch.equal(held.weights[row[2]][start : start + size], memory[row[2]][start : start + size])


def test_a_call_from_before_an_addition_keeps_what_it_reads():
    bank, _ = bank_of(3, 2)
    held = bank.snapshot()
    bank.add("b", *adapter(1, 5))
    row = held.table[0].tolist()
    memory = held.weights[row[2]][row[3] : row[3] + 3 * 48].clone()
    bank.remove("a0")
    bank.add("c", *adapter(3, 6))
    assert torch.equal(held.weights[row[2]][row[3] : row[3] + 3 * 48], memory)


def test_chunks_wait_for_every_earlier_snapshot():
    class Snapshot:
        pass

    chunks = Chunks(64, torch.float32, torch.device("cpu"))
    first, second = Snapshot(), Snapshot()
    a, b = chunks.take(32), chunks.take(32)
    chunks.retire([a], first)
    chunks.retire([b], second)
    del second
    assert chunks.take(32).chunk == 1, "the first snapshot still shows what the second gave up"
    del first
    gc.collect()
    assert {chunks.take(32), chunks.take(32)} == {a, b}


def test_chunks_merge_and_split():
    chunks = Chunks(160, torch.float32, torch.device("cpu"))
    parts = [chunks.take(n) for n in (1, 17, 48, 64)]
    assert [p.offset for p in parts] == [0, 16, 48, 96] and chunks.allocated == 160
    chunks.give_back([parts[2], parts[0], parts[1]])
    assert chunks.take(96).offset == 0 and chunks.take(200).chunk == 1


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_changes_while_other_threads_run(seconds):
    # Every version of an adapter is rank-one with a known product, so a row tells which version it saw.
    bank = AdapterBank(K, N, max_adapters=8, max_rank=4)
    stop, errors, checked = time.monotonic() + seconds, [], [0] * 4

    def entry(value: int, rank: int):
        return torch.full((rank, K), float(value)), torch.full((N, rank), 1.0 / rank)

    for i in range(4):
        bank.add(f"a{i}", *entry(i + 1, 1 + i % 4))

    def reader(number: int):
        x = torch.ones(6, K)
        while time.monotonic() < stop and not errors:
            try:
                ids = bank.ids(["a0", "a1", None, "a2", "a3", "a0"])
                values = sgmv(x, bank, ids) / K
                rounded = values.round()
                # a_i holds i + 1 plus a multiple of 8, whatever its version.
                known = (rounded[:, 0].long() % 8).tolist()
                if known != [1, 2, 0, 3, 4, 1] or not torch.allclose(
                    values, rounded[:, :1].expand_as(values), atol=1e-3
                ):
                    errors.append(f"rows {known}: {values}")
                checked[number] += 1
            except Exception as e:
                errors.append(repr(e))

    def writer(number: int):
        choose = random.Random(number)
        while time.monotonic() < stop and not errors:
            try:
                value = number + 1 + 8 * choose.randrange(64)
                bank.replace(f"a{number}", *entry(value, choose.randint(1, 4)))
                name = f"extra{number}"
                bank.add(name, *entry(value + 4, choose.randint(1, 4)))
                bank.remove(name)
            except Exception as e:
                errors.append(repr(e))

    threads = [threading.Thread(target=f, args=(i,)) for i in range(4) for f in (reader, writer)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors[0]
    assert min(checked) > 3

"""AdapterBank: contents, ids, memory, and changes while other threads run."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import threading
import time

import pytest
import torch
from banks import K, N, adapter, bank_of
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern import Adapter, AdapterBank, multi_lora_linear, sgmv
from peftkern.many import bank as bank_module

SECONDS = float(os.environ.get("PEFTKERN_RACE_SECONDS", "3"))


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


def test_a_deep_copy_is_a_bank_of_its_own():
    bank, listed = bank_of(3, 1)
    bank.add("vectors", *adapter(2, 7), bias=torch.ones(N), base_in_scale=torch.full((K,), 2.0))
    shared = listed[0][0]
    bank.add("shared", shared, listed[0][1], 3.0)
    bank.remove("a1")
    W, x, names = torch.randn(N, K), torch.randn(4, K), ["a0", "vectors", "shared", None]
    ids = bank.ids(names)
    held = bank.snapshot()  # a call that runs
    twin = copy.deepcopy(bank)
    expected = multi_lora_linear(x, W, bank, ids)
    assert twin.names == bank.names and torch.equal(twin.ids(names), ids)
    assert torch.equal(multi_lora_linear(x, W, twin, ids), expected)
    twin.replace("a0", *adapter(8, 1), 2.0)
    twin.remove("vectors")
    twin.add("other", *adapter(4, 2), bias=torch.zeros(N))
    assert torch.equal(multi_lora_linear(x, W, bank, ids), expected) and "other" not in bank
    bank.replace("shared", *adapter(1, 5))
    ours = multi_lora_linear(x, W, twin, twin.ids(["a0", "other", "shared", None]))
    A, B = listed[0][:2]
    want = [(*adapter(8, 1), 2.0), Adapter(*adapter(4, 2), bias=torch.zeros(N)), (A, B, 3.0)]
    torch.testing.assert_close(ours, multi_lora_linear(x, W, want, torch.tensor([0, 1, 2, -1])))
    with pytest.raises(ValueError, match="id"):
        multi_lora_linear(x, W, twin, ids)
    assert held.table.data_ptr() != twin.snapshot().table.data_ptr()
    states = bank.snapshot(), twin.snapshot()
    storages = [{t.data_ptr() for t in (*state.weights, *state.vectors)} for state in states]
    assert len(storages[0]) == len(storages[1]) == 2 and not storages[0] & storages[1]


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
    monkeypatch.setattr(bank_module, "IDS", 3)
    bank = AdapterBank(K, N, max_adapters=1, max_rank=2)
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


@pytest.mark.parametrize(
    ("size", "rank", "dtype"), [(4096, 8, torch.bfloat16), (4096, 1, torch.float32), (512, 64, torch.float16)]
)
def test_memory_is_what_adapters_take_and_half_a_mebibyte_at_most(size, rank, dtype):
    bank = AdapterBank(size, size, max_adapters=256, max_rank=64, dtype=dtype)
    A, B = torch.zeros(rank, size), torch.zeros(size, rank)
    for count in range(1, 40):
        bank.add(str(count), A, B)
        weights = count * rank * 2 * size * dtype.itemsize
        assert bank.nbytes <= weights + max(weights // 2, 2**19)
    assert len(bank.snapshot().weights) <= 10


def test_reserved_room_is_one_piece():
    bank, listed = bank_of(3)
    bank.reserve([8, 8, 1])
    chunks, size = bank.snapshot().weights, bank.nbytes
    for i, rank in enumerate((8, 1, 8)):
        listed.append((*adapter(rank, 20 + i), 1.0 + i))
        bank.add(f"more{i}", *listed[-1])
    assert bank.snapshot().weights is chunks and bank.nbytes == size
    x, names = torch.randn(4, K), ["a0", "more0", "more1", "more2"]
    torch.testing.assert_close(sgmv(x, bank, bank.ids(names)), sgmv(x, listed, torch.arange(4)))
    bank.reserve([])
    for ranks in ([0], [9], [2, 1.5]):
        with pytest.raises(ValueError, match="ranks must be of 1 to 8"):
            bank.reserve(ranks)


def test_memory_follows_the_ranks_and_is_used_again():
    ranks = [8 + (i * 7) % 57 for i in range(1000)]
    bank = AdapterBank(256, 512, max_adapters=1000, max_rank=64)
    A, B = torch.zeros(64, 256), torch.zeros(512, 64)
    for i, r in enumerate(ranks):
        A[0, 0] = i  # else they would be shared
        bank.add(str(i), A[:r], B[:, :r])
    needed = 4 * sum(ranks) * (256 + 512)
    assert needed <= bank.nbytes <= 1.1 * needed
    for round_ in range(3):
        for i, r in enumerate(ranks):
            A[0, 0] = i
            bank.remove(str(i)) if round_ % 2 == 0 else bank.add(str(i), A[:r], B[:, :r])
    assert bank.nbytes <= 1.1 * needed


def change(bank: AdapterBank, seed: int) -> None:
    """A replacement, an addition and a removal."""
    bank.replace("a0", *adapter(3, seed), 9.0)
    bank.add("other", *adapter(3, seed))
    bank.remove("other")


@pytest.mark.parametrize("first", ["replace", "add", "remove"])
def test_a_state_stays_as_it_is_while_it_is_held(first):
    bank, _ = bank_of(3, 2)
    # Its tensors are enough: a compiled call holds nothing else.
    state = bank.snapshot()
    weights, table, scaling = state.weights, state.table, state.scaling
    del state
    shown = [t.clone() for t in (table, scaling)]
    rows = [(row[2], row[3], row[3] + row[1] * 48) for row in table.tolist()[:2]]
    memory = [weights[chunk][start:end].clone() for chunk, start, end in rows]
    if first == "replace":
        bank.replace("a1", *adapter(5, 9), 7.0)
    elif first == "add":
        bank.add("b", *adapter(1, 5))
    else:
        bank.remove("a1")
    for i in range(5):
        change(bank, i)
    assert torch.equal(table, shown[0]) and torch.equal(scaling, shown[1])
    for (chunk, start, end), before in zip(rows, memory):
        assert torch.equal(weights[chunk][start:end], before)


def test_a_compiled_call_keeps_what_it_reads():
    bank, listed = bank_of(3, 5)

    def run_later(graph, _):
        def run(*args):
            for i in range(4):
                change(bank, i)
            return graph(*args)

        return run

    def call(x, W, ids):
        return multi_lora_linear(x, W, bank, ids).sin()

    x, W, ids = torch.randn(3, K), torch.randn(N, K), bank.ids(["a0", "a1", None])
    got = torch.compile(call, fullgraph=True, backend=run_later)(x, W, ids)
    torch.testing.assert_close(got, multi_lora_linear(x, W, listed, torch.tensor([0, 1, -1])).sin())
    assert sgmv(x, bank, ids)[0].ne(sgmv(x, listed[:1], torch.tensor([0, -1, -1]))[0]).any(), "changed meanwhile"


class Operations(TorchDispatchMode):
    """Names of the operations that run, and the elements of what they make or change."""

    def __init__(self):
        super().__init__()
        self.names, self.elements = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        if not function.is_view:
            self.elements += sum(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if t is not None)
        return out


class AtFirstCopy(TorchDispatchMode):
    """Calls a function before the first copy into memory: of a bank, when it takes an adapter's weights."""

    def __init__(self, meanwhile):
        super().__init__()
        self.meanwhile = meanwhile

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.meanwhile is not None and function is torch.ops.aten.copy_.default:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return function(*args, **(kwargs or {}))


def cost_of_changes(size: int) -> tuple[int, float]:
    """(elements written, best time) of a removal and an addition, half of the bank's memory being free, in pieces."""
    bank, (A, B) = AdapterBank(K, N, max_adapters=size, max_rank=2), adapter(1, 0)
    apart = A.repeat(size, 1, 1)
    for i in range(size):
        bank.add(str(i), apart[i], B)
    for i in range(0, size, 2):
        bank.remove(str(i))

    def pair():
        bank.remove("5")
        bank.add("5", A, B)

    with Operations() as seen:
        pair()
    assert "clone" not in seen.names
    elements, times = seen.elements, []
    for _ in range(40):
        start = time.thread_time()
        pair()
        times.append(time.thread_time() - start)
    # A state that is held costs one copy of table and scaling, however many changes follow.
    held = bank.snapshot()
    shown = held.table.clone()
    with Operations() as seen:
        for _ in range(3):
            pair()
    assert seen.names.count("clone") == 2 and torch.equal(held.table, shown)
    x, names = torch.randn(4, K), [str(size - 1), "5", None, "1"]
    torch.testing.assert_close(sgmv(x, bank, bank.ids(names)), sgmv(x, [(A, B, 1.0)], torch.tensor([0, 0, -1, 0])))
    return elements, min(times)


def test_other_devices_keep_their_table_in_place():
    """Captured graphs read it where it is, whoever holds a state."""
    bank = AdapterBank(K, N, max_adapters=4, max_rank=8, device="meta")
    held = bank.snapshot()
    with Operations() as seen:
        bank.add("a0", *adapter(2, 0))
        change(bank, 1)
    now = bank.snapshot()
    assert held is not now and held.scaling is now.scaling
    assert held.table.untyped_storage()._cdata == now.table.untyped_storage()._cdata
    assert "clone" not in seen.names


def test_a_change_costs_the_same_in_a_large_bank():
    (elements, seconds), (elements_large, seconds_large) = cost_of_changes(16), cost_of_changes(2048)
    assert elements_large == elements
    assert seconds_large < 2.5 * seconds


def test_weights_are_copied_while_others_use_the_bank():
    bank, listed = bank_of(3)
    x, done = torch.randn(1, K), []

    def meanwhile():
        done.append(sgmv(x, bank, bank.ids(["a0"])))
        bank.add("meanwhile", *adapter(2, 6))
        bank.remove("meanwhile")

    def in_a_thread():
        thread = threading.Thread(target=meanwhile, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "waits for the copy"

    listed.append((*adapter(4, 7), 3.0))
    with AtFirstCopy(in_a_thread):
        bank.add("b", *listed[1])
    torch.testing.assert_close(done[0], sgmv(x, listed, torch.tensor([0])))
    torch.testing.assert_close(sgmv(x, bank, bank.ids(["b"])), sgmv(x, listed, torch.tensor([1])))


@pytest.mark.parametrize("what", ["add", "replace", "fail", "fill"])
def test_what_others_did_during_a_copy_is_respected(what):
    """Of two additions of one name the later is refused; so is the replacement of what is gone; memory is not lost."""
    bank, _ = bank_of(3, max_adapters=2)
    size, entry = None, adapter(2, 1)

    def another():
        if what == "fail":
            raise MemoryError
        bank.remove("a0") if what == "replace" else bank.add("b" if what == "add" else "c", *adapter(1, 2))

    error, match = {
        "add": (ValueError, "'b' is in the bank"), "replace": (KeyError, "no adapter 'a0'"), "fail": (MemoryError, None),
        "fill": (RuntimeError, "full"),
    }[what]  # fmt: skip
    for _ in range(6):
        with pytest.raises(error, match=match), AtFirstCopy(another):
            bank.replace("a0", *entry) if what == "replace" else bank.add("b", *entry)
        names = {"add": ["a0", "b"], "replace": [], "fail": ["a0"], "fill": ["a0", "c"]}[what]
        assert bank.names == names and bank.nbytes == (size or bank.nbytes)
        size = bank.nbytes
        bank.add("a0", *adapter(3, 0)) if what == "replace" else [bank.remove(n) for n in names[1:]]


def test_banks_with_the_same_ids_share_routes():
    """In whatever order adapters came; not after a removal, and again after the same one."""
    one, two = (AdapterBank(K, N, max_adapters=4, max_rank=8) for _ in range(2))
    assert one.snapshot().slots == two.snapshot().slots
    assert one.snapshot().slots != AdapterBank(K, N, max_adapters=5, max_rank=8).snapshot().slots
    states = []
    for bank in (one, two):
        for name in "abc":
            bank.add(name, *adapter(2, 0))
        bank.remove("b")
        states.append(bank.snapshot().slots)
        bank.replace("a", *adapter(3, 1))
        assert bank.snapshot().slots == states[-1], "a route is of ids alone"
    assert states[0] == states[1]
    one.add("b", *adapter(2, 0))
    assert one.snapshot().slots != two.snapshot().slots
    two.add("d", *adapter(7, 3))
    assert one.snapshot().slots == two.snapshot().slots


def test_changes_while_other_threads_run():
    """PEFTKERN_RACE_SECONDS=60 for a long look."""
    # Every version of an adapter is rank-one with a known product, so a row tells which version it saw.
    bank = AdapterBank(K, N, max_adapters=8, max_rank=4)
    stop, errors, checked = time.monotonic() + SECONDS, [], [0] * 4

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
                # One that comes and goes is there whole, or refused.
                with contextlib.suppress(KeyError, ValueError):
                    values = sgmv(x[:1], bank, bank.ids([f"extra{number}"])) / K
                    if values[0, 0].round().long() % 8 != (number + 5) % 8 or not torch.allclose(values, values[:, :1]):
                        errors.append(f"not adapter extra{number}: {values}")
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

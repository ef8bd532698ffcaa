"""A row of a batch with many adapters depends on nothing but itself: not on its neighbours, their number, their
adapters, on what lies in memory beside its own, or on the way the call takes."""

from __future__ import annotations

import pytest
import torch

from peftkern import AdapterBank, lora_linear, multi_lora_linear, sgmv
from peftkern.backends.cpu import native as cpu_native
from peftkern.many.chunks import Chunks
from peftkern.ops.adapter_table import A_OFFSET

pytestmark = pytest.mark.skipif(cpu_native._C is None, reason="the C++ extension is not built")

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16)
# Few rows of an adapter are read as they lie in memory, many through packed tiles; ranks odd and mixed.
RANKS = (16, 1, 7, 64, 33, 130)


def make_adapters(K: int, N: int, dtype: torch.dtype, ranks=RANKS):
    return [
        ((torch.randn(r, K) / K**0.5).to(dtype), (torch.randn(N, r) / r**0.5).to(dtype), 0.5 + i)
        for i, r in enumerate(ranks)
    ]


def as_bank(adapters, K: int, N: int) -> tuple[AdapterBank, torch.Tensor]:
    """A bank with holes in it, and the number of each adapter (-1 last)."""
    bank = AdapterBank(K, N, max_adapters=3 * len(adapters), max_rank=512, dtype=adapters[0][0].dtype)
    numbers = []
    for i, adapter in enumerate(adapters):
        bank.add(f"hole {i}", torch.full((3, K), NAN), torch.full((N, 3), NAN), NAN)
        numbers.append(bank.add(f"a{i}", *adapter))
    for i in range(len(adapters)):
        bank.remove(f"hole {i}")
    return bank, torch.tensor([*numbers, -1])


def compositions(M: int, ids: torch.Tensor, count: int = 50):
    """Row numbers: subsets in any order, of one adapter alone, with repeats, from one row to all of them."""
    for i in range(count):
        if i % 5 == 0:
            mine = (ids == ids[i % M]).nonzero()[:, 0]
            yield mine[torch.randperm(len(mine))][: 1 + i]
        elif i % 5 == 1:
            yield torch.randint(M, (int(torch.randint(1, 2 * M, ())),))
        else:
            yield torch.randperm(M)[: int(torch.randint(1, M + 1, ()))]


@pytest.mark.parametrize("kept_in", ["list", "bank"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("whole_row", [False, True], ids=["branch", "whole row"])
def test_bits_of_a_row_in_50_compositions(monkeypatch, dtype, kept_in, whole_row):
    M, K, N = 260, 335, 410
    adapters = make_adapters(K, N, dtype)
    x, W = torch.randn(M, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype)
    bias, ids = torch.randn(N).to(dtype), torch.randint(-1, len(RANKS), (M,))
    # Adapter 0 takes more than half of the rows: its segment is many units of work.
    ids[torch.rand(M) < 0.5] = 0
    if kept_in == "bank":
        adapters, numbers = as_bank(adapters, K, N)
        ids = numbers[ids]
    if whole_row:
        monkeypatch.setenv("PEFTKERN_BATCH_INVARIANT", "1")

    def run(rows: torch.Tensor) -> torch.Tensor:
        if whole_row:
            return multi_lora_linear(x[rows], W, adapters, ids[rows], bias=bias)
        return sgmv(x[rows], adapters, ids[rows])

    with torch.no_grad():
        whole = run(torch.arange(M))
        seen = set()
        for rows in compositions(M, ids):
            assert torch.equal(run(rows), whole[rows]), f"{len(rows)} rows"
            seen.add(len(rows))
    assert min(seen) == 1 and max(seen) > M


@pytest.mark.parametrize("kept_in", ["list", "bank"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_input_gradient_in_50_compositions(monkeypatch, dtype, kept_in):
    monkeypatch.setenv("PEFTKERN_BATCH_INVARIANT", "1")
    M, K, N = 90, 180, 150
    adapters = make_adapters(K, N, dtype)
    x, dy, W = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype), torch.randn(N, K).to(dtype)
    ids = torch.randint(-1, len(RANKS), (M,))
    if kept_in == "bank":
        adapters, numbers = as_bank(adapters, K, N)
        ids = numbers[ids]

    def run(rows: torch.Tensor) -> torch.Tensor:
        own = x[rows].requires_grad_()
        return torch.autograd.grad(multi_lora_linear(own, W, adapters, ids[rows]), own, dy[rows])[0]

    whole = run(torch.arange(M))
    for rows in compositions(M, ids):
        assert torch.equal(run(rows), whole[rows]), f"{len(rows)} rows"


# One pass over W, the vendor's product, panels, and pairs of bf16 where the CPU has them.
SIZES = ((1, 64, 96), (7, 301, 77), (40, 130, 515), (600, 96, 5), (520, 2900, 2900))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, N", SIZES)
def test_an_all_base_batch_has_the_bits_of_lora_linears_base_product(M, K, N, dtype):
    x, W, bias = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    poison = [(torch.full((r, K), NAN).to(dtype), torch.full((N, r), NAN).to(dtype), NAN) for r in (4, 20)]
    none = x.new_empty(0, K), x.new_empty(N, 0)
    base, ids = lora_linear(x, W, *none, bias=bias), torch.full((M,), -1)
    bank, _ = as_bank(poison, K, N)
    for adapters in (poison, bank):
        assert torch.equal(multi_lora_linear(x, W, adapters, ids, bias=bias), base)
        assert not sgmv(x, adapters, ids).any()
        out = base.clone()
        assert torch.equal(sgmv(x, adapters, ids, out=out), base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_of_others_reaches_no_row(dtype):
    """Not from freed slots, slots never used, adapters without rows, or adapters and inputs of other rows."""
    M, K, N = 41, 77, 130
    adapters = make_adapters(K, N, dtype, (5, 16, 3))
    x, W = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    ids = torch.randint(-1, 2, (M,))
    want = multi_lora_linear(x, W, adapters, ids)
    poisoned = [adapters[0], *((torch.full_like(A, NAN), torch.full_like(B, NAN), NAN) for A, B, _ in adapters[1:])]
    bank, numbers = as_bank(poisoned, K, N)
    # Memory that was given back and taken again beside what stays.
    for rank in (2, 9, 400):
        bank.add("gone", torch.full((rank, K), NAN), torch.full((N, rank), NAN), NAN)
        bank.remove("gone")
    bad, good = ids == 1, ids != 1
    dirty = x.clone()
    dirty[bad] = NAN
    for given, of in ((poisoned, ids), (bank, numbers[ids])):
        for rows in (dirty, x):
            found = multi_lora_linear(rows, W, given, of)
            assert torch.equal(found[good], want[good]) and found[bad].isnan().all()
    clean = multi_lora_linear(dirty, W, adapters, ids)
    assert torch.equal(clean[good], want[good])
    # Backward: dx of a row, and the gradients of an adapter, come from their own rows.
    leaves = [(A.clone().requires_grad_(), B.clone().requires_grad_(), s) for A, B, s in adapters]
    dy = torch.randn(M, N).to(dtype)
    dy[bad] = NAN
    own = dirty.requires_grad_()
    multi_lora_linear(own, W, leaves, ids).backward(dy)
    assert own.grad[good].isfinite().all() and own.grad[bad].isnan().all()
    assert leaves[0][0].grad.isfinite().all() and leaves[0][1].grad.isfinite().all()
    assert not leaves[2][0].grad.any() and not leaves[2][1].grad.any(), "no rows: zeros"


def test_a_bank_beyond_2_to_the_31_elements(monkeypatch):
    """The second adapter lies past 2^31 elements of its chunk, whose memory is reserved and all but untouched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    M, K, N = 9, 70, 45
    near, far = make_adapters(K, N, torch.bfloat16, (5, 12))
    bank = AdapterBank(K, N, max_adapters=2, max_rank=16, dtype=torch.bfloat16)
    take = Chunks.take

    def taken(self, size: int):
        take(self, 2**31) if self.tensors else self.reserve(2**31 + (1 << 20))
        return take(self, size)

    monkeypatch.setattr(Chunks, "take", taken)
    try:
        first = bank.add("near", *near)
    except RuntimeError as error:
        pytest.skip(f"4 GB of addresses are not to be had: {error}")
    second = bank.add("far", *far)
    assert bank.snapshot().table[second, A_OFFSET] > 2**31
    x, ids = torch.randn(M, K).bfloat16(), torch.randint(-1, 2, (M,))
    for with_grad in (False, True):
        rows = x.clone().requires_grad_(with_grad)
        got = sgmv(rows, bank, torch.tensor([first, second, -1])[ids])
        want = sgmv(rows, [near, far], ids)
        assert torch.equal(got, want)
        if with_grad:
            dy = torch.randn(M, N).bfloat16()
            assert torch.equal(*(torch.autograd.grad(y, rows, dy)[0] for y in (got, want)))


class TestTheShortWay:
    """A call that nothing watches does without torch's dispatcher, and gives the same bits."""

    @staticmethod
    def arguments(dtype=torch.float32):
        K, N, M = 33, 29, 12
        return torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), make_adapters(K, N, dtype), (
            torch.randint(-1, len(RANKS), (M,))
        )  # fmt: skip

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
    def test_same_bits(self, dtype):
        x, W, adapters, ids = self.arguments(dtype)
        bias = torch.randn(29).to(dtype)

        def run():
            added = sgmv(x, adapters, ids, out=torch.ones(12, 29, dtype=dtype))
            return multi_lora_linear(x, W, adapters, ids, bias=bias), sgmv(x, adapters, ids), added

        short = run()
        with torch.profiler.profile() as watched:
            long = run()
        assert {"peftkern::multi_lora_linear_fwd", "peftkern::sgmv_add"} <= {e.key for e in watched.key_averages()}
        assert all(torch.equal(a, b) for a, b in zip(short, long))

    def test_arguments_are_checked_as_ever(self):
        x, W, adapters, ids = self.arguments()
        for bad, word in (
            (dict(bias=torch.randn(28)), "bias"), (dict(bias=torch.randn(1)), "bias"),
            (dict(x=x[:, :-1]), "x has shape"), (dict(weight=W[:-1]), "weight"), (dict(weight=W.to("meta")), "weight"),
            (dict(adapter_ids=ids[:-1]), "adapter_ids"), (dict(adapter_ids=ids + 99), "adapter_ids"),
        ):  # fmt: skip
            given = dict(x=x, weight=W, adapters=adapters, adapter_ids=ids) | bad
            with pytest.raises((ValueError, TypeError), match=word):
                multi_lora_linear(**given)

"""Bits that must not depend on what else is in a batch, or on how many programs share the work."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from peftkern.kernels import configs
from peftkern.kernels.multi.configs import BASES
from peftkern.ops.adapter_table import table_row
from peftkern.settings import using
from peftkern.testing.arguments import backward, forward
from peftkern.testing.arguments import base as base_of

ops = torch.ops.peftkern
NAN = float("nan")
EVERY_ID = 2**31 - 1
K, N, RANKS = 300, 40, (16, 5, 40, 1, 8)


@pytest.fixture(autouse=True)
def one_order_of_summation(monkeypatch):
    """A matrix unit sums every element of a tile in the same order; the BLAS that the interpreter asks does not."""
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype=None: (a[:, :, None] * b[None]).sum(1, dtype=dtype))


def normal(*shape: int, seed: int, dtype=torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Rows:
    """Thirty rows with their gradients and adapters, which other batches bring with them."""

    def __init__(self, dtype: torch.dtype, adapter_dtype: torch.dtype):
        self.x, self.dy = normal(30, K, seed=1, dtype=dtype), normal(30, N, seed=2, dtype=dtype)
        self.weight = normal(N, K, seed=3, dtype=dtype) / K**0.5
        self.ids = torch.randint(-1, 4, (30,), generator=torch.Generator().manual_seed(4))
        self.weights, rows = [], []
        for i, R in enumerate(RANKS):
            rows.append(table_row(i, R, 2 * i, 0, K, 2 * i + 1, 0, R, 1, 0))
            self.weights += [
                normal(R, K, seed=5 + i, dtype=adapter_dtype) / K**0.5, normal(N, R, seed=9 + i, dtype=adapter_dtype)
            ]  # fmt: skip
        self.table, self.scaling = torch.tensor(rows), torch.tensor([0.5, 1.0, 1.5, 2.0, 0.7])

    def run(self, x: Tensor, dy: Tensor, ids: Tensor, weights: list[Tensor], base: bool) -> tuple[Tensor, ...]:
        """(y, u, dx) of a batch; without the base product what sgmv makes of the batch too."""
        route = ops.multi_lora_linear_route(ids, self.table, EVERY_ID)
        weight, args, R = base_of(self.weight if base else None), (weights, self.table, self.scaling), max(RANKS)
        y, u, _ = ops.multi_lora_linear_fwd(x, *weight, N, None, *args, R, *route, None, None)
        dx, *_ = ops.multi_lora_linear_bwd(
            dy, None, u, *weight, K, *args, *route, None, None, True, False, [False] * len(weights)
        )
        if base:
            return y, u, dx
        out = torch.zeros_like(y)
        ops.sgmv_add(out, x, *args, R, *route)
        return y, u, dx, out

    def compositions(self, count: int):
        """(rows of ours, their places, x, dy, ids, weights) of random batches in which the other rows are anything."""
        rng = random.Random(0)
        for number in range(count):
            ours = torch.tensor(rng.sample(range(30), rng.choice((1, 2, 5, 9))))
            M = rng.choice((1, 13, 33))
            M = max(M, len(ours))
            place = torch.tensor(rng.sample(range(M), len(ours)))
            x, dy = normal(M, K, seed=100 + number, dtype=self.x.dtype), normal(M, N, seed=200 + number)
            dy = dy.to(self.x.dtype)
            x[place], dy[place] = self.x[ours], self.dy[ours]
            # The other rows: of one adapter, of any, of none, or of one that is full of NaN.
            kind, weights = number % 4, list(self.weights)
            ids = [torch.full((M,), rng.randrange(4)), torch.tensor([rng.randrange(-1, 5) for _ in range(M)]),
                   torch.full((M,), -1), torch.full((M,), 4)][kind]  # fmt: skip
            if kind == 3:
                x, dy, weights[8] = x.fill_(NAN), dy.fill_(NAN), torch.full_like(weights[8], NAN)
                x[place], dy[place] = self.x[ours], self.dy[ours]
            ids = ids.clone()
            ids[place] = self.ids[ours]
            yield ours, place, x, dy, ids, weights


@pytest.mark.parametrize("dtype, batches", [(torch.float16, 8), (torch.float32, 4)], ids=str)
def test_a_rows_branch_in_any_batch(dtype, batches):
    rows = Rows(dtype, dtype)
    expected = rows.run(rows.x, rows.dy, rows.ids, rows.weights, base=False)
    for ours, place, *batch in rows.compositions(batches):
        for got, want in zip(rows.run(*batch, base=False), expected, strict=True):
            assert torch.equal(got[place], want[ours])


def test_whole_rows_with_batch_invariance(monkeypatch):
    monkeypatch.setenv("PEFTKERN_BATCH_INVARIANT", "1")
    rows = Rows(torch.float16, torch.float32)
    expected = rows.run(rows.x, rows.dy, rows.ids, rows.weights, base=True)
    for ours, place, *batch in rows.compositions(8):
        for got, want in zip(rows.run(*batch, base=True), expected, strict=True):
            assert torch.equal(got[place], want[ours])


def test_the_number_of_programs_does_not_change_bits():
    rows = Rows(torch.float16, torch.float32)
    results = []
    for values in (dict(multi_partial=False), dict(multi_partial=True), dict(multi_columns=1), dict(multi_columns=2)):
        with using(triton_fixed=configs.fixed(**values)):
            results.append(rows.run(rows.x, rows.dy, rows.ids, rows.weights, base=True))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r))


@pytest.mark.parametrize("others", (1, 4, 300))
def test_the_other_adapters_do_not_change_bits(others):
    """Neither how many there are nor their ranks, on which the size of the launch depends."""
    x, A, B = normal(9, 300, seed=1), normal(6, 300, seed=2), normal(40, 6, seed=3)
    ranks, results = [130] + [3] * (others - 1), []
    for weights in ([A, B], [A, B, *(t for R in ranks for t in (normal(R, 300, seed=4), normal(40, R, seed=5)))]):
        held = [A.shape[0] for A in weights[::2]]
        table = torch.tensor([table_row(i, R, 2 * i, 0, 300, 2 * i + 1, 0, R, 1, 0) for i, R in enumerate(held)])
        route = ops.multi_lora_linear_route(torch.tensor([0, -1, 0, 0, 0, -1, 0, 0, 0]), table, EVERY_ID)
        args = weights, table, torch.ones(len(held)), max(held), *route, None, None
        results.append(ops.multi_lora_linear_fwd(x, *base_of(None), 40, None, *args))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1][:, :6])


def test_equal_calls_give_equal_gradients():
    rows = Rows(torch.float16, torch.float16)
    route = ops.multi_lora_linear_route(rows.ids, rows.table, EVERY_ID)
    p = torch.tensor([0.5, 0.0, 0.1, 0.3, 0.0], dtype=torch.float64)
    u = normal(30, max(RANKS), seed=1, dtype=torch.float32)
    with using(triton_fixed=configs.fixed(multi_ranges=(2, 16), multi_grad=configs.LaunchConfig(16, 64, 0, 16))):
        once, again = (
            ops.multi_lora_linear_bwd(
                rows.dy, rows.x, u, *base_of(rows.weight), K, rows.weights, rows.table, rows.scaling, *route, p,
                torch.tensor([7]), True, True, [True] * len(rows.weights),
            )
            for _ in "ab"
        )  # fmt: skip
    for a, b in zip((once[0], once[1], *once[2]), (again[0], again[1], *again[2]), strict=True):
        assert torch.equal(a, b)


# A base that is named here does not depend on the setting.
@pytest.mark.parametrize("base, invariant", [(None, "0"), (None, "1"), *((base, "0") for base in BASES)])
@pytest.mark.parametrize("bias_dtype", (None, torch.float16, torch.float32), ids=str)
def test_rows_without_an_adapter_have_the_bits_of_lora_linear(monkeypatch, base, bias_dtype, invariant):
    monkeypatch.setenv("PEFTKERN_BATCH_INVARIANT", invariant)
    owner = {"fused": "fused", "own": "fused", "vendor": "epilogue"}.get(base)
    rows = Rows(torch.float16, torch.float16)
    bias = None if bias_dtype is None else normal(N, seed=8, dtype=bias_dtype)
    x, ids = rows.x, torch.full((30,), -1)
    none, alone = (torch.empty(0, K), torch.empty(N, 0)), dict(base=owner) if owner else {}
    route = ops.multi_lora_linear_route(ids, rows.table, EVERY_ID)
    with using(triton_fixed=configs.fixed(**alone, **(dict(multi_base=base) if base else {}))):
        args = rows.weights, rows.table, rows.scaling
        y, u, _ = ops.multi_lora_linear_fwd(x, *base_of(rows.weight), N, bias, *args, 40, *route, None, None)
        expected, v, _ = ops.lora_linear_fwd(*forward(x, rows.weight, *none, bias=bias))
        dx, *_ = ops.multi_lora_linear_bwd(
            rows.dy,
            None,
            u,
            *base_of(rows.weight),
            K,
            *args,
            *route,
            None,
            None,
            True,
            False,
            [False] * len(rows.weights),
        )
        back = ops.lora_linear_bwd(*backward(rows.dy, None, v, None, rows.weight, *none, needs=("x",)))[0]
    assert torch.equal(y, expected) and torch.equal(dx, back) and not u.any()

"""Vectors per adapter on the Triton kernels: every vector at once, every owner of the base product, all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peftkern import Adapter, multi_lora_linear
from peftkern.bases.base import IDENTITY
from peftkern.kernels import configs
from peftkern.kernels.multi.configs import BASES
from peftkern.settings import using
from peftkern.testing.accuracy import check
from peftkern.testing.multi_problems import random_multi_problem
from peftkern.testing.problems import vectors

ALL = tuple(vectors())
BRANCH = ("rank_scale", "delta_in_scale", "delta_out_scale")


def problem(dtype, mix="skewed"):
    """Four adapters: none, all vectors, those of the branch and a bias, one of them; the last has few rows."""
    some = random_multi_problem(3, dtype, max_M=20)
    return replace(
        some, M=23, K=40, N=37, ranks=(3, 17, 2, 5), scalings=(0.5, -1.5, 2.0, 1.0), dropout_p=(0.0,) * 4, mix=mix,
        base_share=0.2, bias=True, bank=False, branch=False, frozen=frozenset(), layout="contiguous",
        vectors=((), ALL, (*BRANCH, "bias"), ("base_out_scale",)),
    )  # fmt: skip


def holds(p) -> None:
    bad = [row for row in check(p) if not row.ok]
    assert not bad, f"{p}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


@pytest.mark.parametrize("base", BASES)
def test_all_vectors(base):
    with using(triton_fixed=configs.fixed(multi_base=base)):
        holds(problem(torch.float16 if base == "own" else torch.float32, mix="uniform"))
        # Without scales of the base it can be multiplied in the same kernel.
        holds(replace(problem(torch.float16), vectors=((), (*BRANCH, "bias"), (), ("rank_scale",))))


def test_dropout_and_a_bank():
    some = problem(torch.float32)
    holds(replace(some, dropout_p=(0.3, 0.5, 0.0, 0.1), scalings=(1.0,) * 4))
    holds(replace(some, bank=True, frozen=frozenset(n for n in some.tensors() if n[-1].isdigit())))
    holds(replace(some, branch=True, bias=False, vectors=((), BRANCH, ("rank_scale",), ())))


@pytest.mark.parametrize("partial, ranges", [(True, (2, 32)), (False, (3, 16))])
def test_every_kind_of_launch(partial, ranges):
    blocks = dict(multi_partial=partial, multi_ranges=ranges, multi_grad=configs.LaunchConfig(16, 64, 0, 16))
    with using(triton_fixed=configs.fixed(**blocks)):
        holds(replace(problem(torch.float32), M=40, K=290))


def test_an_identity_base_and_adapters_without_matrices(monkeypatch):
    K = 33
    x, bias = torch.randn(9, K, requires_grad=True), torch.randn(K, requires_grad=True)
    leaves = [torch.randn(K).requires_grad_() for _ in range(3)]
    adapters = [Adapter(base_in_scale=leaves[0]), Adapter(base_out_scale=leaves[1], bias=leaves[2])]
    ids, dy = torch.tensor([0, 1, -1, 0, 0, 1, 1, -1, 0]), torch.randn(9, K)
    weight = torch.randn(K, K)
    for base in (IDENTITY, weight):
        got = []
        for name in ("triton", "reference"):
            monkeypatch.setenv("PEFTKERN_BACKEND", name)
            y = multi_lora_linear(x, base, adapters, ids, bias=bias)
            got.append((y, *torch.autograd.grad(y, (x, bias, *leaves), dy)))
        torch.testing.assert_close(got[0], got[1])

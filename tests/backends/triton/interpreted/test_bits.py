"""Bits: dropout equals Philox written in NumPy, whatever the tiles; equal calls and equal rows give equal results."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peftkern.kernels import configs
from peftkern.kernels.configs import LaunchConfig
from peftkern.settings import using
from peftkern.testing.arguments import backward
from peftkern.testing.arguments import forward as arguments

ops = torch.ops.peftkern


def philox_mask(seed: int, M: int, K: int, p: float) -> np.ndarray:
    """The kept elements from the published algorithm, in NumPy's 64-bit integers."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    group, row = np.meshgrid(np.arange((K + 7) // 8, dtype=np.uint64), np.arange(M, dtype=np.uint64))
    c = [group & low, group >> shift, row & low, row >> shift]
    key = np.uint64(seed % 2**64)
    k = [key & low, key >> shift]
    for _ in range(7):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> shift) ^ c[1] ^ k[0], b & low, (a >> shift) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    words = np.stack([w for v in c for w in (v, ((v << np.uint64(16)) | (v >> np.uint64(16))) & low)], axis=-1)
    return words.reshape(M, -1)[:, :K] >= np.uint64(int(p * 2.0**32))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999, 2.0**-32, 1 - 2.0**-33])
def test_mask_is_philox(seed, p):
    for M, K in ((3, 17), (20, 1030), (1, 8)):
        mask = ops.dropout_mask(torch.tensor([seed]), M, K, p)
        assert mask.dtype == torch.bool
        np.testing.assert_array_equal(mask.numpy(), philox_mask(seed, M, K, p))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_mask(shape):
    assert ops.dropout_mask(torch.tensor([1]), *shape, 0.5).shape == shape


M, K, P, SEED = 50, 120, 0.3, 99
MASK = torch.from_numpy(philox_mask(SEED, M, K, P))


def forward(x, A, B=None, p=P, weight=None):
    B = torch.zeros(8, A.shape[0]) if B is None else B
    weight = torch.zeros(B.shape[0], x.shape[1], dtype=x.dtype) if weight is None else weight
    return ops.lora_linear_fwd(*arguments(x, weight, A, B, dropout_p=p, seed=torch.tensor([SEED]) if p else None))


def gradients(dy, x, u, A, B, needs=("A", "B", "bias"), p=P, weight=None, **vectors):
    """(dx, dA, dB, dbias, those of the vectors) with a zero base unless there is a ``weight``."""
    weight = torch.zeros(B.shape[0], A.shape[1], dtype=dy.dtype) if weight is None else weight
    seed = torch.tensor([SEED]) if p else None
    return ops.lora_linear_bwd(*backward(dy, x, u, None, weight, A, B, needs=needs, dropout_p=p, seed=seed, **vectors))


def input_gradient(A, **vectors):
    """dx of a du of ones."""
    dy, B = torch.ones(M, 1), torch.ones(1, A.shape[0])
    return gradients(dy, None, torch.zeros(M, A.shape[0]), A, B, ("x",), **vectors)[0]


def check_kept(value: torch.Tensor) -> None:
    assert torch.equal(value, torch.where(MASK, torch.tensor(1 / (1 - P)), torch.tensor(0.0)))


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("block_k", [16, 32, 128])
@pytest.mark.parametrize("groups", [1, 3])
def test_bits_of_the_shrink(block_m, block_k, groups):
    with using(triton_fixed=configs.fixed(shrink=LaunchConfig(block_m, 64, block_k, 64), shrink_groups=groups)):
        check_kept(forward(torch.ones(M, K), torch.eye(K))[1])


# The smallest tiles, which are the most programs, once for each owner; the order of the sums matters to a tile of any size.
@pytest.mark.parametrize("block, scaled", [((16, 16), False), ((64, 32), False), ((64, 32), True), ((128, 128), True)])
@pytest.mark.parametrize("base", ["fused", "epilogue", "overlap"])
def test_bits_of_dx(block, base, scaled):
    config = LaunchConfig(*block, 16, 16)
    p_b = torch.ones(K) if scaled else None
    with using(triton_fixed=configs.fixed(base=base, gemm=config, epilogue=config)):
        dx = input_gradient(torch.ones(1, K), p_b=p_b)
    check_kept(dx)


@pytest.mark.parametrize("block", [(16, 16), (32, 64), (64, 128)])
def test_bits_of_dA(block):
    with using(triton_fixed=configs.fixed(adapter_grad=LaunchConfig(*block, 0, 64))):
        # du = dy B with B the identity, so row t of dA is the dropped row t of x.
        dA = gradients(torch.eye(M), torch.ones(M, K), torch.ones(M, M), torch.zeros(M, K), torch.eye(M))[1]
    check_kept(dA)


def test_dropped_elements_contribute_exactly_nothing():
    x = torch.ones(M, K).masked_fill(~MASK, float("nan"))
    weight = torch.zeros(8, K)
    for base in ("fused", "epilogue"):
        with using(triton_fixed=configs.fixed(base=base)):
            u = forward(x, torch.eye(K), weight=weight)[1]
            check_kept(u)
            dA = gradients(torch.eye(M), x, torch.ones(M, M), torch.zeros(M, K), torch.eye(M))[1]
            check_kept(dA)
            dx = input_gradient(torch.full((1, K), float("inf")))
            assert torch.equal(torch.isinf(dx), MASK) and (dx[~MASK] == 0).all()


def random(*shape, seed=0, dtype=torch.float16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def du_of(dy, u, A, B, p):
    """du, as the gradient of A shows it of an x that is the identity: beside those of B and the bias."""
    rows = dy.shape[0]
    x = torch.zeros(rows, A.shape[1], dtype=dy.dtype)
    x.fill_diagonal_(1)
    dA = gradients(dy, x, u, A, B, p=p)[1].t()[:rows]
    return dA[torch.from_numpy(philox_mask(SEED, rows, K, p)).diagonal()] if p else dA


def du_alone(dy, u, B):
    """du, as dx shows it where A is the identity and there is no base."""
    return gradients(dy, None, u, torch.eye(B.shape[1]), B, ("x",), 0.0)[0]


@pytest.mark.parametrize("rank, p, alone", [(8, P, False), (8, 0.0, True), (40, 0.0, False), (70, P, True)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_rows_branch_does_not_depend_on_the_other_rows(rank, p, alone, dtype):
    # Two tiles of rows, three blocks of columns of x and, above 32, chunks of ranks; du beside the gradients and alone.
    x, A, B = random(70, 120, dtype=dtype), random(rank, 120, seed=1).float(), random(72, rank, seed=2).float()
    dy = random(70, 72, seed=3, dtype=dtype)

    def run(rows):
        u = forward(x[:rows], A, B, p)[1]
        return u, du_alone(dy[:rows], u, B) if alone else du_of(dy[:rows], u, A, B, p)

    whole_u, whole_du = run(70)
    assert whole_du.abs().sum() > 0
    for rows in (1, 5, 64, 67):
        u, du = run(rows)
        assert torch.equal(u, whole_u[:rows])
        assert torch.equal(du, whole_du[: len(du)])


def test_the_number_of_programs_does_not_change_bits():
    x, A = random(70, 260), random(24, 260, seed=1, dtype=torch.float32)
    results = []
    for groups in (1, 3, 100):
        with using(triton_fixed=configs.fixed(shrink_groups=groups)):
            results.append(forward(x, A)[1])
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_equal_calls_give_equal_bits():
    x, A, B = random(90, 120), random(10, 120, seed=1), random(60, 10, seed=2)
    w, dy = random(60, 120, seed=4), random(90, 60, seed=3)
    u, needs = random(90, 10, dtype=torch.float32), ("x", "A", "B", "bias")
    once, again = ((*forward(x, A, B, weight=w), *gradients(dy, x, u, A, B, needs, weight=w)[:4]) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(once, again))


def test_batch_invariance_covers_the_base_product(monkeypatch):
    monkeypatch.setenv("PEFTKERN_BATCH_INVARIANT", "1")
    # Two tiles of rows and of columns, four blocks of the sum.
    x, A, B, w = random(150, 130), random(8, 130, seed=1), random(140, 8, seed=2), random(140, 130, seed=4)
    whole = forward(x, A, B, weight=w)[0]
    for rows in (1, 17, 128):
        assert torch.equal(forward(x[:rows], A, B, weight=w)[0], whole[:rows])

"""Accuracy of every output and gradient against fp64, for each owner of the base product and each kind of launch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from peftkern import lora_linear
from peftkern.kernels import configs
from peftkern.kernels.configs import LaunchConfig
from peftkern.settings import using
from peftkern.testing.accuracy import check
from peftkern.testing.problems import LoRALinearProblem, random_problem, vectors

VECTORS = tuple(vectors())
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_accurate(problem):
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


@pytest.mark.parametrize("base", configs.BASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_problems(base, dtype):
    # Other problems for each owner and dtype. "overlap" has the kernels of "epilogue", in another order.
    first = 3000 + 10 * (len(DTYPES) * configs.BASES.index(base) + DTYPES.index(dtype))
    with using(triton_fixed=configs.fixed(base=base)):
        for seed in range(first, first + (3 if base == "overlap" else 5)):
            assert_accurate(random_problem(seed, dtype, max_M=150, max_KN=300, max_R=150))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_problems_on_the_identity(dtype):
    for seed in range(5):
        problem = random_problem(3100 + seed, dtype, max_M=100, max_KN=150, max_R=70)
        assert_accurate(dataclasses.replace(problem, base="identity", N=problem.K))


def everything(**changes) -> LoRALinearProblem:
    """Ragged sizes, every optional argument, dropout, all gradients."""
    base = LoRALinearProblem(
        seed=5, M=75, K=141, N=133, R=11, dtype=torch.float16, adapter_dtype=torch.float32, scaling=0.7,
        dropout_p=0.4, options=VECTORS, layout="row_stride",
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("rank", [1, 2, 15, 16, 17, 32, 33, 64, 65, 129, 300])
def test_ranks(rank):
    # Chunks of the rank are what costs here: with many of them K and N are one and two blocks.
    size = dict(R=rank, M=37, K=70, N=45) if rank <= 64 else dict(R=rank, M=19, K=30, N=37)
    assert_accurate(everything(**size))
    assert_accurate(everything(**size, dtype=torch.float32, options=("bias",), zero_weight=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("same", [False, True], ids=["fp32-adapters", "same-dtype"])
@pytest.mark.parametrize("options", [(), VECTORS], ids=["plain", "all-vectors"])
def test_branch_alone(dtype, same, options):
    # With a zero weight nothing hides the branch; without vectors its order in the kernel is the other one.
    problem = everything(
        dtype=dtype, adapter_dtype=dtype if same else torch.float32, options=options, zero_weight=True, M=67, K=70, N=69
    )  # two tiles of rows, of columns, and two or three steps of each sum
    for base in ("fused", "epilogue"):
        with using(triton_fixed=configs.fixed(base=base)):
            assert_accurate(problem)


def test_tiny_lora_b_keeps_its_precision():
    assert_accurate(everything(b_scale=1e-6, options=("bias",), zero_weight=True))


# Parameters whose gradients are not made by the base product.
BRANCH = frozenset({"lora_A", "lora_B", "rank_scale", "delta_in_scale", "delta_out_scale"})
GEMMS = {
    "descriptors": LaunchConfig(64, 64, 32, 16, tma=True),
    "descriptors-persistent": LaunchConfig(32, 64, 32, 16, tma=True, persistent=3),
    "persistent-flat": LaunchConfig(64, 32, 16, 16, persistent=2, flatten=True),
    "narrow": LaunchConfig(16, 16, 16, 16, group=1),
    "wide": LaunchConfig(128, 256, 64, 32, warps=8),
}


@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.parametrize("options", [(), VECTORS], ids=["plain", "all-vectors"])
def test_every_kind_of_fused_launch(name, options):
    config = GEMMS[name]
    # Two by three tiles of y and three steps along K. Rows of a multiple of 16 bytes, so that descriptors are used where they
    # are asked for; then rows that are not.
    M, K, N = config.block_m + 9, 2 * config.block_k + 16, 2 * config.block_c + 16
    aligned, ragged = dict(M=M, K=K, N=N, layout="contiguous"), dict(M=M, K=K + 3, N=N - 5)
    with using(triton_fixed=configs.fixed(base="fused", gemm=config)):
        for size in (aligned, ragged) if config.tma else (ragged,):
            for dtype in (torch.float16,) if name == "wide" else (torch.float16, torch.float32):
                # The product is that of y and dx, which scales of the base change; adapters' gradients come elsewhere.
                assert_accurate(everything(options=options, dtype=dtype, frozen=BRANCH, **size))


@pytest.mark.parametrize(
    "config", [LaunchConfig(16, 16, 32, 16), LaunchConfig(32, 32, 64, 32), LaunchConfig(64, 64, 128, 64)]
)
@pytest.mark.parametrize("groups", [1, 2, 100])
def test_every_kind_of_shrink(config, groups):
    with using(triton_fixed=configs.fixed(shrink=config, shrink_groups=groups)):
        # Three blocks of K, two tiles of rows.
        size = dict(M=config.block_m + 7, K=2 * config.block_k + 21, N=30)
        # u and, for dx, du.
        assert_accurate(everything(R=40, options=("delta_in_scale", "rank_scale"), frozen=BRANCH, **size))


@pytest.mark.parametrize(
    "config", [LaunchConfig(16, 32, 0, 16), LaunchConfig(64, 128, 0, 32), LaunchConfig(32, 64, 0, 64)]
)
@pytest.mark.parametrize("ranges", [(1, 80), (2, 48), (5, 16)])
def test_every_kind_of_adapter_gradient(config, ranges):
    ranges, rows = ranges
    rows = max(rows, config.block_m)
    with using(triton_fixed=configs.fixed(adapter_grad=config, grad_ranges=(configs.cdiv(75, rows), rows))):
        # One tile of ranks, or two and three; how rows are shared out is nothing to them.
        for rank in (11, 35) if ranges == 2 else (35,):
            assert_accurate(everything(R=rank, K=config.block_c + 13, N=config.block_c + 18, frozen=frozenset({"x"})))


def test_transposed_weight_is_used_as_it_lies():
    # A Conv1D weight of the transformers library arrives as a transposed view.
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 48, generator=g), torch.randn(48, 32, generator=g).t()
    a, b = torch.randn(4, 48, generator=g), torch.randn(32, 4, generator=g)
    with using(triton_fixed=configs.fixed(base="fused")):
        leaf = x.clone().requires_grad_()
        y = lora_linear(leaf, w, a, b)
        torch.testing.assert_close(y, x @ w.t() + x @ a.t() @ b.t(), rtol=1e-4, atol=1e-4)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        torch.testing.assert_close(grad, torch.ones(20, 32) @ (w + b @ a), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_rows_stay_in_their_rows(value):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 64, generator=g), torch.randn(32, 64, generator=g)
    a, b = torch.randn(4, 64, generator=g), torch.randn(32, 4, generator=g)
    for base in ("fused", "epilogue"):
        with using(triton_fixed=configs.fixed(base=base)):
            clean = lora_linear(x, w, a, b)
            dirty = x.clone()
            dirty[7, 3] = value
            y = lora_linear(dirty, w, a, b)
        assert not torch.isfinite(y[7]).any()
        rest = torch.arange(40) != 7
        assert torch.equal(y[rest], clean[rest])

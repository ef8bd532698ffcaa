"""What the ops return and refuse: shapes and dtypes, empty results for what is not needed, invalid configurations."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from peftkern.backends import triton as backend
from peftkern.dispatch import registry as dispatch
from peftkern.dispatch import tuned
from peftkern.kernels import configs, launch
from peftkern.kernels.configs import LaunchConfig
from peftkern.kernels.operand import rows_of
from peftkern.ops.lora_linear import lora_linear_bwd_adapter_ref, lora_linear_bwd_input_ref, lora_linear_fwd_ref
from peftkern.problem import Problem

ops = torch.ops.peftkern


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


M, K, N, R = 21, 40, 33, 5
X, W, A, B, DY = normal(M, K), normal(N, K), normal(R, K), normal(N, R), normal(M, N)
U, H, DU = normal(M, R), normal(M, N) + 1, normal(M, R) - 1
SEED = torch.tensor([3])


def assert_same(ours, reference):
    for a, b in zip(ours, reference, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "needs", list(itertools.product([False, True], repeat=7)), ids=lambda n: "".join("01"[v] for v in n)
)
def test_every_subset_of_adapter_gradients(needs):
    need_A, _, _, _, need_delta_in, need_base_out, _ = needs
    x = X if need_A or need_delta_in else None
    h = H if need_base_out else None
    args = (DY, x, U, h, A, B, 1.5, 0.25, SEED, normal(R), normal(K), normal(N), *needs)
    assert_same(ops.lora_linear_bwd_adapter(*args), lora_linear_bwd_adapter_ref(*args))


@pytest.mark.parametrize("base", ["fused", "epilogue", "overlap"])
@pytest.mark.parametrize("save", [False, True])
def test_forward_and_input_gradient(base, save):
    with configs.override(base=base):
        args = (X, W, A, B, normal(N), 1.5, 0.25, SEED, None, None, None, None, None, save)
        assert_same(ops.lora_linear_fwd(*args), lora_linear_fwd_ref(*args))
        args = (DY, DU, X if save else None, W, A, 0.25, SEED, None, None, None, save)
        assert_same(ops.lora_linear_bwd_input(*args), lora_linear_bwd_input_ref(*args))


def strided(t: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "transposed":
        return t.t().contiguous().t()
    if kind == "expanded":
        return t[:1].expand_as(t)
    wide = torch.full((2 * t.shape[0], 3 * t.shape[1]), float("nan"))
    wide[::2, ::3] = t
    return wide[::2, ::3]


@pytest.mark.parametrize("kind", ["transposed", "expanded", "steps"])
@pytest.mark.parametrize("base", ["fused", "epilogue"])
def test_any_strides(kind, base):
    x, w, a, b, dy, u, h, du = (strided(t, kind) for t in (X, W, A, B, DY, U, H, DU))
    vector = torch.full((2 * R,), float("nan"))
    vector[::2] = normal(R)
    d = vector[::2]
    with configs.override(base=base):
        args = (x, w, a, b, None, 1.5, 0.25, SEED, d, None, None, None, None, True)
        assert_same(ops.lora_linear_fwd(*args), lora_linear_fwd_ref(*args))
        args = (dy, x, u, h, a, b, 1.5, 0.25, SEED, d, None, None, *[True] * 7)
        assert_same(ops.lora_linear_bwd_adapter(*args), lora_linear_bwd_adapter_ref(*args))
        args = (dy, du, x, w, a, 0.25, SEED, None, None, None, True)
        assert_same(ops.lora_linear_bwd_input(*args), lora_linear_bwd_input_ref(*args))


@pytest.mark.parametrize("empty", ["M", "K", "N", "R", "MN", "KR", "MKNR"])
@pytest.mark.parametrize("base", ["fused", "epilogue"])
@pytest.mark.parametrize("options", [False, True], ids=["plain", "all-vectors"])
def test_empty_sizes(empty, base, options):
    m, k, n, r = (0 if name in empty else size for name, size in dict(M=M, K=K, N=N, R=R).items())
    x, w, a, b, dy = X[:m, :k], W[:n, :k], A[:r, :k], B[:n, :r], DY[:m, :n]
    u, h, du = U[:m, :r], H[:m, :n], DU[:m, :r]
    d, p_b, p_d, g_b, g_d = (normal(size) if options else None for size in (r, k, k, n, n))
    with configs.override(base=base):
        args = (x, w, a, b, normal(n), 1.5, 0.25, SEED, d, p_b, p_d, g_b, g_d, options)
        assert_same(ops.lora_linear_fwd(*args), lora_linear_fwd_ref(*args))
        args = (dy, x, u, h if options else None, a, b, 1.5, 0.25, SEED, d, p_d, g_d, *[True] * 5, options, True)
        assert_same(ops.lora_linear_bwd_adapter(*args), lora_linear_bwd_adapter_ref(*args))
        args = (dy, du, x if options else None, w, a, 0.25, SEED, p_b, p_d, g_b, options)
        assert_same(ops.lora_linear_bwd_input(*args), lora_linear_bwd_input_ref(*args))


def test_rows_far_apart_are_copied():
    # Offsets within a tile are 32-bit.
    far = torch.empty(128, 1 << 25, dtype=torch.float16, device="meta")[:, :K]
    assert rows_of(far).stride() == (K, 1)
    assert rows_of(X[:, 3:]).stride() == (K, 1) and rows_of(X[:, 3:]).data_ptr() == X[:, 3:].data_ptr()


def test_arguments_are_left_alone():
    before = [t.clone() for t in (X, W, A, B, DY, U, H)]
    ops.lora_linear_fwd(X, W, A, B, normal(N), 1.5, 0.25, SEED, None, None, None, None, None, False)
    ops.lora_linear_bwd_adapter(DY, X, U, H, A, B, 1.5, 0.25, SEED, None, None, None, *[True] * 7)
    assert all(torch.equal(a, b) for a, b in zip(before, (X, W, A, B, DY, U, H)))


def test_an_invalid_configuration_is_refused_before_anything_runs():
    with (
        configs.override(base="fused", gemm=LaunchConfig(48, 64, 32)),
        pytest.raises(ValueError, match="powers of two"),
    ):
        ops.lora_linear_fwd(X, W, A, B, None, 1.0, 0.0, None, None, None, None, None, None, False)
    with pytest.raises(ValueError, match="base is 'mine'"), configs.override(base="mine"):
        pass
    with pytest.raises(ValueError, match="nothing called gem"), configs.override(gem=1):
        pass


def problem(**changes) -> Problem:
    values = dict(
        op="lora_linear_fwd",
        device="cpu",
        arch="",
        dtype=torch.float32,
        adapter_dtype=torch.float32,
        M=4,
        N=4,
        K=4,
        R=4,
    )
    return Problem(**(values | changes))


def test_declines():
    assert backend.unavailable() is None
    assert backend.decline(problem()) is None
    assert "float64" in backend.decline(problem(dtype=torch.float64))
    assert "2^31" in backend.decline(problem(M=2**31))
    assert "cuda" in backend.decline(problem(device="cuda"))


@pytest.mark.parametrize("base", ["fused", "epilogue"])
def test_what_was_measured_decides(base, monkeypatch):
    """A measured owner of the base product, and its tiles, reach the launch; an override still goes first."""
    config = LaunchConfig(32, 32, 16, 16, warps=4, stages=2)
    entry = tuned.Entry(base, dataclasses.asdict(config) if base == "fused" else None)
    launches, submit = [], launch.submit
    monkeypatch.setattr(tuned, "entry", lambda problem: entry)
    monkeypatch.setattr(launch, "submit", lambda one: launches.append(one) or submit(one))
    dispatch.forget()
    args = (X, W, A, B, None, 1.5, 0.0, None, None, None, None, None, None, False)
    try:
        for forced in (None, "fused" if base == "epilogue" else "epilogue"):
            with configs.override(**{"base": forced} if forced else {}):
                launches.clear()
                assert_same(ops.lora_linear_fwd(*args), lora_linear_fwd_ref(*args))
                last = launches[-1].constants
                assert last["GEMM"] == ((forced or base) == "fused")
                if base == "fused" and forced is None:
                    assert (last["BLOCK_M"], last["BLOCK_N"], last["BLOCK_K"]) == (32, 32, 16)
    finally:
        dispatch.forget()

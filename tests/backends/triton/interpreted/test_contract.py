"""What the ops return and refuse: shapes and dtypes, empty results for what is not needed, invalid configurations."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

from peftkern.backends import triton as backend
from peftkern.dispatch import tuned
from peftkern.equation import Needs, Scales
from peftkern.kernels import configs, launch
from peftkern.kernels.configs import LaunchConfig
from peftkern.kernels.operand import rows_of
from peftkern.ops.lora_linear import lora_linear_bwd_ref, lora_linear_fwd_ref
from peftkern.problem import Problem
from peftkern.settings import current, using
from peftkern.testing.arguments import backward, forward

ops = torch.ops.peftkern


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


M, K, N, R = 21, 40, 33, 5
X, W, A, B, DY = normal(M, K), normal(N, K), normal(R, K), normal(N, R), normal(M, N)
U, H = normal(M, R), normal(M, N) + 1
SEED = torch.tensor([3])
NUMBERS = dict(scaling=1.5, dropout_p=0.25, seed=SEED)
ALL = Needs._fields


def assert_same(ours, reference):
    for a, b in zip(flat(ours), flat(reference), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def flat(outs):
    return [t for out in outs for t in (out if isinstance(out, list) else [out])]


def assert_forward(c):
    assert_same(ops.lora_linear_fwd(*c), lora_linear_fwd_ref(c))


def assert_backward(c):
    assert_same(ops.lora_linear_bwd(*c), lora_linear_bwd_ref(c))


def vectors(sizes=(R, K, K, N, N)):
    return dict(zip(Scales._fields, map(normal, sizes), strict=True))


@pytest.mark.parametrize(
    "needs", list(itertools.product([False, True], repeat=7)), ids=lambda n: "".join("01"[v] for v in n)
)
def test_every_subset_of_gradients(needs):
    """Of the branch; with p_b's and x's, which share the base product, each alone and both together."""
    names = [name for name, need in zip(("A", "B", "bias", "d", "p_d", "g_b", "g_d"), needs, strict=True) if need]
    scales = dict(d=normal(R), p_d=normal(K), g_d=normal(N))
    for more in ((), ("x",), ("p_b",), ("x", "p_b"))[:: 1 if sum(needs) in (0, 1, 6, 7) else 3]:
        asked = {*names, *more}
        x = X if asked & {"A", "p_d", "p_b"} else None
        h = H if "g_b" in asked else None
        assert_backward(backward(DY, x, U, h, W, A, B, needs=asked, **NUMBERS, **scales))


@pytest.mark.parametrize("base", ["fused", "epilogue", "overlap"])
@pytest.mark.parametrize("save", [False, True])
def test_forward_and_input_gradient(base, save):
    with using(triton_fixed=configs.fixed(base=base)):
        assert_forward(forward(X, W, A, B, bias=normal(N), save_base=save, **NUMBERS))
        assert_backward(
            backward(DY, X if save else None, U, None, W, A, B, needs=("x", "p_b") if save else ("x",), **NUMBERS)
        )


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
    x, w, a, b, dy, u, h = (strided(t, kind) for t in (X, W, A, B, DY, U, H))
    vector = torch.full((2 * R,), float("nan"))
    vector[::2] = normal(R)
    d = vector[::2]
    with using(triton_fixed=configs.fixed(base=base)):
        assert_forward(forward(x, w, a, b, save_base=True, d=d, **NUMBERS))
        assert_backward(backward(dy, x, u, h, w, a, b, needs=ALL, d=d, **NUMBERS))


@pytest.mark.parametrize("empty", ["M", "K", "N", "R", "MN", "KR", "MKNR"])
@pytest.mark.parametrize("base", ["fused", "epilogue"])
@pytest.mark.parametrize("options", [False, True], ids=["plain", "all-vectors"])
def test_empty_sizes(empty, base, options):
    m, k, n, r = (0 if name in empty else size for name, size in dict(M=M, K=K, N=N, R=R).items())
    x, w, a, b, dy = X[:m, :k], W[:n, :k], A[:r, :k], B[:n, :r], DY[:m, :n]
    u, h = U[:m, :r], H[:m, :n]
    scales = vectors((r, k, k, n, n)) if options else {}
    needs = ALL if options else [name for name in ALL if name not in ("p_b", "g_b")]
    with using(triton_fixed=configs.fixed(base=base)):
        assert_forward(forward(x, w, a, b, bias=normal(n), save_base=options, **scales, **NUMBERS))
        assert_backward(backward(dy, x, u, h if options else None, w, a, b, needs=needs, **scales, **NUMBERS))


def test_rows_far_apart_are_copied():
    # Offsets within a tile are 32-bit.
    far = torch.empty(128, 1 << 25, dtype=torch.float16, device="meta")[:, :K]
    assert rows_of(far).stride() == (K, 1)
    assert rows_of(X[:, 3:]).stride() == (K, 1) and rows_of(X[:, 3:]).data_ptr() == X[:, 3:].data_ptr()


def test_arguments_are_left_alone():
    before = [t.clone() for t in (X, W, A, B, DY, U, H)]
    ops.lora_linear_fwd(*forward(X, W, A, B, bias=normal(N), **NUMBERS))
    ops.lora_linear_bwd(*backward(DY, X, U, H, W, A, B, needs=ALL, **NUMBERS))
    assert all(torch.equal(a, b) for a, b in zip(before, (X, W, A, B, DY, U, H)))


def test_an_invalid_configuration_is_refused_before_anything_runs():
    with (
        using(triton_fixed=configs.fixed(base="fused", gemm=LaunchConfig(48, 64, 32))),
        pytest.raises(ValueError, match="powers of two"),
    ):
        ops.lora_linear_fwd(*forward(X, W, A, B))
    with pytest.raises(ValueError, match="base is 'mine'"):
        configs.fixed(base="mine")
    with pytest.raises(ValueError, match="nothing called gem"):
        configs.fixed(gem=1)


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
    assert backend.unavailable(current()) is None
    assert backend.decline(problem(), current()) is None
    assert "float64" in backend.decline(problem(dtype=torch.float64), current())
    assert "2^31" in backend.decline(problem(M=2**31), current())
    assert "cuda" in backend.decline(problem(device="cuda"), current())
    for op in ("lora_linear_fwd", "lora_linear_bwd", "multi_lora_linear_fwd", "multi_lora_linear_bwd"):
        assert backend.decline(problem(op=op, flags=frozenset({"identity"})), current()) is None


@pytest.mark.parametrize("base", ["fused", "epilogue"])
def test_what_was_measured_decides(base, monkeypatch, tmp_path):
    """A measured owner of the base product, and its tiles, reach the launch; what is fixed still goes first."""
    config = LaunchConfig(32, 32, 16, 16, warps=4, stages=2)
    sizes = dict(op="lora_linear_fwd", dtype="fp32", adapter_dtype="fp32", dropout=False, M=M, N=N, K=K, R=R)
    row = sizes | dict(choice=base, config=dataclasses.asdict(config) if base == "fused" else None)
    (tmp_path / "x.json").write_text(json.dumps({"schema": tuned.SCHEMA, "rows": [row]}))
    launches, submit = [], launch.submit
    monkeypatch.setattr(launch, "submit", lambda one: launches.append(one) or submit(one))
    given = forward(X, W, A, B, scaling=1.5)
    for fixed in ({}, {"base": "fused" if base == "epilogue" else "epilogue"}):
        with using(tables=(str(tmp_path),), gpu="x", triton_fixed=configs.fixed(**fixed)):
            launches.clear()
            assert_forward(given)
            last = launches[-1].constants
            assert last["GEMM"] == (fixed.get("base", base) == "fused")
            if base == "fused" and not fixed:
                assert (last["BLOCK_M"], last["BLOCK_N"], last["BLOCK_K"]) == (32, 32, 16)

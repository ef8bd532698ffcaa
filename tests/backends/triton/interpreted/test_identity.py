"""The identity base: x is read where a base product would be, with every vector and gradient, and with many adapters."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from peftkern.kernels import launch
from peftkern.ops import multi_lora_linear as op
from peftkern.ops.adapter_table import table_row
from peftkern.testing.accuracy import check
from peftkern.testing.problems import LoRALinearProblem, vectors

ops = torch.ops.peftkern
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROBLEM = LoRALinearProblem(
    seed=3, M=35, K=70, N=70, R=11, dtype=torch.float16, adapter_dtype=torch.float32, scaling=0.7, base="identity"
)
OPTIONS = {
    "plain": (),
    "p_b": ("base_in_scale",),
    "g_b": ("base_out_scale",),
    "branch": ("bias", "rank_scale", "delta_in_scale", "delta_out_scale"),
    "all": tuple(vectors()),
}


def assert_accurate(problem):
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_vector_and_gradient(options, dtype):
    problem = dataclasses.replace(PROBLEM, options=OPTIONS[options], dtype=dtype)
    assert_accurate(problem)
    assert_accurate(dataclasses.replace(problem, dropout_p=0.4, layout="transposed"))


@pytest.mark.parametrize("size", [dict(M=0), dict(M=1, K=1, N=1, R=1), dict(R=70, K=40, N=40)], ids=str)
def test_sizes(size):
    assert_accurate(dataclasses.replace(PROBLEM, options=OPTIONS["all"], **size))


@pytest.mark.parametrize("save_base", [False, True])
def test_the_base_is_never_copied_unless_it_is_wanted(save_base, monkeypatch):
    from peftkern.kernels.call import Forward, Settings
    from peftkern.kernels.lora_linear import forward

    taken, submit = [], launch.submit
    monkeypatch.setattr(launch, "submit", lambda one: taken.append(one) or submit(one))
    x, A, B = torch.randn(5, 16), torch.randn(4, 16), torch.randn(16, 4)
    y, u, h = forward(Forward(x, None, A, B, save_base=save_base), Settings(0))
    read = [one.args["base"] for one in taken if one.name == "expand_kernel"]
    assert len(read) == 1 and read[0].data_ptr() == x.data_ptr()
    torch.testing.assert_close(y, x + x @ A.t() @ B.t())
    assert h.shape == (x.shape if save_base else (0,))
    if save_base:
        assert torch.equal(h, x) and h.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_many_adapters(dtype):
    gen = torch.Generator().manual_seed(1)
    M, K, R = 37, 70, 5

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    x, dy, bias = normal(M, K).to(dtype), normal(M, K).to(dtype), normal(K)
    weights = [w for _ in range(2) for w in (normal(R, K) / K**0.5, normal(K, R))]
    table = torch.tensor([table_row(i, R, 2 * i, 0, K, 2 * i + 1, 0, R, 1, 0) for i in range(2)])
    scaling, p = torch.tensor([0.5, 0.75]), torch.tensor([0.3, 0.0], dtype=torch.float64)
    seed = torch.tensor([7])
    route = ops.multi_lora_linear_route(torch.randint(-1, 2, (M,), generator=gen), table, 2**31 - 1)

    def forward(f, bound):
        return op.MultiForward(
            f(x), [], "identity", K, f(bias) if bound else bias, [f(w) for w in weights] if bound else weights, table,
            f(scaling) if bound else scaling, R, *route, p, seed,
        )  # fmt: skip

    def backward(f, u, bound):
        return op.MultiBackward(
            f(dy), f(x), u, [], "identity", K, [f(w) for w in weights] if bound else weights, table,
            f(scaling) if bound else scaling, *route, p, seed, True, True, [True] * 4,
        )  # fmt: skip

    y, u, _ = ops.multi_lora_linear_fwd(*forward(lambda t: t, False))
    dx, dbias, grads, _ = ops.multi_lora_linear_bwd(*backward(lambda t: t, u, False))
    want = [t for f in (torch.Tensor.double, lambda t: t.double().abs()) for t in (
        op.multi_lora_linear_fwd_ref(forward(f, True))[0], op.multi_lora_linear_bwd_ref(backward(f, f(u), True))[0]
    )]  # fmt: skip
    ulp = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}[dtype]
    for got, exact, magnitude in zip((y, dx), want[:2], want[2:]):
        assert got.shape == exact.shape
        assert bool(((got.double() - exact).abs() <= 2.0**-15 * magnitude + 2 * ulp * exact.abs()).all())
    assert all(torch.isfinite(g).all() for g in (dbias, *grads))

"""The native calls of lora_linear give the bits of the steps they are made of, called one by one from Python."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import Dropout, base_product, column_dot, expand, panel, reduce, scale_copy, vector
from torch import Tensor

from peftkern.backends.cpu import call, native
from peftkern.equation import Scales
from peftkern.ops.lora_linear import Backward, Forward
from peftkern.testing.arguments import backward, forward
from peftkern.testing.problems import DROPOUT_SEED, LoRALinearProblem, random_problem

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

SCALES = ("rank_scale", "base_in_scale", "delta_in_scale", "base_out_scale", "delta_out_scale")


def rows(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def forward_steps(c: Forward, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(y, u, h): one pass over x, then the base product, whose blocks get the branch as they are completed."""
    drop, s = Dropout.of(c.dropout_p, c.seed), c.at
    (M, _), N = c.x.shape, c.base[0].shape[0]
    u, y, h = floats(M, c.lora_A.shape[0]), c.x.new_empty((M, N)), c.x.new_empty((M, N))
    reduce(c.x, dropout=drop, p=panel(c.lora_A, col_scale=vector(s.p_d)), out=u, alpha_dot=drop.scale)
    p = panel(c.lora_B.t(), alpha=c.scaling, row_scale=vector(s.d), col_scale=vector(s.g_d))

    def epilogue(r0, r1, c0, c1, block):
        block = h[r0:r1, c0:c1] if block is None else block
        h[r0:r1, c0:c1] = block
        expand(
            y[r0:r1, c0:c1], src=block, v=u, p=p, row0=r0, col0=c0, base_scale=vector(s.g_b), bias=vector(c.bias)
        )  # fmt: skip

    base_product(c.x, c.base[0], transpose=True, in_scale=s.p_b, out=h, epilogue=epilogue, kind=kind)
    return y, u, h


def backward_steps(c: Backward, kind: str) -> tuple[Tensor, ...]:
    """(dx, dA, dB, dbias, those of the vectors), all of them: passes over dy, x and W."""
    drop, s = Dropout.of(c.dropout_p, c.seed), c.at
    (M, N), (R, K) = c.dy.shape, c.lora_A.shape
    d, p_d, g_d = vector(s.d), vector(s.p_d), vector(s.g_d)
    du, G, dbias, dd = floats(M, R), floats(R, N), floats(N), floats(R)
    # d goes into the panel, unless its gradient needs what du is before.
    p = panel(c.lora_B.t(), alpha=c.scaling, row_scale=None if c.need.d else d, col_scale=g_d)
    if R * N <= 1 << 20:
        reduce(c.dy, p=p, out=du, v=c.u, g=G, colsum=dbias)
    else:
        reduce(c.dy, p=p, out=du)
        reduce(c.dy, v=c.u, g=G, colsum=dbias)
    if c.need.d:
        column_dot(du, c.u, dd)
        du = du if d is None else du * d
    dA, dB = torch.empty_like(c.lora_A), torch.empty_like(c.lora_B)
    if dB.numel():
        scale_copy(G, dB.t(), alpha=c.scaling, row_scale=d, col_scale=g_d)
    G, dg_d, dg_b = G if d is None else G * d[:, None], floats(N), floats(N)
    column_dot(G, c.lora_B.t(), dg_d)
    if c.need.g_b:
        column_dot(c.dy, c.h, dg_b)
    GA, dp_d = floats(R, K), floats(K)
    reduce(c.x, dropout=drop, v=du, g=GA, alpha_outer=drop.scale)
    column_dot(GA, c.lora_A, dp_d)
    if dA.numel():
        scale_copy(GA, dA, col_scale=p_d)
    dx, dp_b, p = c.dy.new_empty((M, K)), torch.zeros(K), panel(c.lora_A, col_scale=p_d)

    def epilogue(r0, r1, c0, c1, block):
        out = dx[r0:r1, c0:c1]
        block = out if block is None else block
        column_dot(block, c.x[r0:r1, c0:c1], dp_b[c0:c1], accumulate=True)
        expand(
            out, src=block, v=du, p=p, alpha=drop.scale, dropout=drop, row0=r0, col0=c0, base_scale=vector(s.p_b)
        )  # fmt: skip

    base_product(c.dy, c.base[0], transpose=False, in_scale=s.g_b, out=dx, epilogue=epilogue, kind=kind)
    return dx, dA, dB, dbias, dd, dp_b, dp_d, dg_b, dg_d * c.scaling


def assert_same_bits(problem: LoRALinearProblem, kind: str, threads: int) -> None:
    t = problem.tensors()
    x, dy, weight, A, B, bias = rows(t["x"]), rows(t["dy"]), t["weight"], t["lora_A"], t["lora_B"], t.get("bias")
    scales = Scales(*(t.get(name) for name in SCALES))
    seed = torch.tensor([DROPOUT_SEED]) if problem.dropout_p else None
    numbers = dict(scaling=problem.scaling, dropout_p=problem.dropout_p, seed=seed)
    names = [name for name, vector in (("bias", bias), *scales._asdict().items()) if vector is not None]
    needs, save = ("x", "A", "B", *names), scales.g_b is not None

    c = forward(x, weight, A, B, bias=bias, save_base=save, **numbers, **scales._asdict())
    y, u, h = forward_steps(c, kind)
    args = (None, threads, x, "dense", weight, A, B, bias, *numbers.values(), tuple(scales), True, save)
    assert call.learn_forward(*args, kind)
    got = call.forward(*args)
    pairs = [(got[0], y), (got[1], u)] + ([(got[2], h)] if save else [])

    c = backward(dy, x, u, h if save else None, weight, A, B, needs=needs, **numbers, **scales._asdict())
    bits = sum(1 << i for i, need in enumerate(c.needs) if need)
    args = (
        None, threads, dy, x, u, c.h, "dense", weight, A, B, *numbers.values(), tuple(scales), bits, problem.K, problem.R,
        A.dtype,
    )  # fmt: skip
    assert call.learn_backward(*args, kind)
    found = call.backward(*args)
    assert [g is not None for g in found] == c.needs
    pairs += zip(found, backward_steps(c, kind), strict=True)
    for i, (mine, theirs) in enumerate(pairs):
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs)), (problem, kind, threads, i)


@pytest.mark.parametrize("kind", ["vendor", "panels", "few", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_of_random_problems(level, kind, dtype, threads):
    if kind == "bf16" and (dtype != torch.bfloat16 or not native._C.base_gemm_bf16_usable()):
        pytest.skip("needs bf16, and a CPU and level with AVX512-BF16")
    torch.set_num_threads(threads)
    small = kind == "vendor" and dtype != torch.float32
    for seed in range(6):
        limits = dict(max_M=32, max_KN=100) if small else dict(max_M=64 if kind == "few" else 400, max_KN=600, max_R=70)
        problem = random_problem(7000 + seed, dtype, **limits)
        t = problem.tensors()
        if kind == "bf16" and {"base_in_scale", "base_out_scale"} & t.keys():
            continue
        assert_same_bits(problem, kind, threads)


def test_bits_of_adapters_too_large_for_one_pass_over_dy():
    # R N above 2^20: by rows for du, by columns for the gradient of B.
    options = ("bias", *SCALES)
    problem = LoRALinearProblem(
        5, 40, 30, 4200, 260, torch.float32, torch.float32, scaling=0.5, dropout_p=0.1, options=options
    )
    assert_same_bits(problem, "panels", torch.get_num_threads())


def test_bits_of_a_scaled_product_in_parts():
    # More than 16 MB of scaled input: the vendor gets it in parts.
    for N in (24, 7):
        problem = LoRALinearProblem(
            6, 5000, 900, N, 4, torch.float32, torch.float32, options=("base_in_scale", "base_out_scale")
        )
        assert_same_bits(problem, "vendor", torch.get_num_threads())

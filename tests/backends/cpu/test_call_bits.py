"""The native calls of lora_linear give the bits of the steps they are made of, called one by one from Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftkern.backends.cpu import base_plan, call, native
from peftkern.backends.cpu.lora_linear import lora_linear_bwd_adapter, lora_linear_bwd_input, lora_linear_fwd
from peftkern.testing.problems import DROPOUT_SEED, LoRALinearProblem, random_problem

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

SCALES = ("rank_scale", "base_in_scale", "delta_in_scale", "base_out_scale", "delta_out_scale")


def rows(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def assert_same_bits(problem: LoRALinearProblem, kind: str, threads: int) -> None:
    t = problem.tensors()
    x, dy, weight, A, B, bias = rows(t["x"]), rows(t["dy"]), t["weight"], t["lora_A"], t["lora_B"], t.get("bias")
    d, p_b, p_d, g_b, g_d = scales = tuple(t.get(name) for name in SCALES)
    seed = torch.tensor([DROPOUT_SEED]) if problem.dropout_p else None
    numbers = problem.scaling, problem.dropout_p, seed
    needs = [bias is not None, *(s is not None for s in scales)]
    need_bias, need_d, need_p_b, need_p_d, need_g_b, need_g_d = needs

    y, u, h = lora_linear_fwd(x, weight, A, B, bias, *numbers, *scales, need_g_b)
    forward = (None, threads, x, weight, A, B, bias, *numbers, scales, True, need_g_b)
    assert call.learn_forward(*forward, kind)
    got = call.forward(*forward)
    pairs = [(got[0], y), (got[1], u)] + ([(got[2], h)] if need_g_b else [])

    du, *adapter = lora_linear_bwd_adapter(
        dy, x, u, h, A, B, *numbers, d, p_d, g_d, True, True, need_bias, need_d, need_p_d, need_g_b, need_g_d
    )
    dx, dbase_in = lora_linear_bwd_input(dy, du, x, weight, A, problem.dropout_p, seed, p_b, p_d, g_b, need_p_b)
    dA, dB, dbias, drank, ddelta_in, dbase_out, ddelta_out = adapter
    bits = sum(1 << i for i, need in enumerate((True, True, True, *needs)) if need)
    backward = (
        None, threads, dy, x, u, h if need_g_b else None, weight, A, B, *numbers, scales, bits, problem.K, problem.R,
        A.dtype,
    )  # fmt: skip
    assert call.learn_backward(*backward, kind)
    pairs += zip(
        call.backward(*backward), (dx, dA, dB, dbias, drank, dbase_in, ddelta_in, dbase_out, ddelta_out), strict=True
    )
    for i, (mine, theirs) in enumerate(pairs):
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs)), (problem, kind, threads, i)


@pytest.mark.parametrize("kind", ["vendor", "panels", "few", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_of_random_problems(monkeypatch, level, kind, dtype, threads):
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
        monkeypatch.setattr(base_plan, "choose", lambda *args, **kwargs: kind)
        assert_same_bits(problem, kind, threads)


def test_bits_of_adapters_too_large_for_one_pass_over_dy(monkeypatch):
    # R N above 2^20: by rows for du, by columns for the gradient of B.
    monkeypatch.setattr(base_plan, "choose", lambda *args, **kwargs: "panels")
    options = ("bias", *SCALES)
    problem = LoRALinearProblem(
        5, 40, 30, 4200, 260, torch.float32, torch.float32, scaling=0.5, dropout_p=0.1, options=options
    )
    assert_same_bits(problem, "panels", torch.get_num_threads())


def test_bits_of_a_scaled_product_in_parts(monkeypatch):
    # More than 16 MB of scaled input: the vendor gets it in parts.
    monkeypatch.setattr(base_plan, "choose", lambda *args, **kwargs: "vendor")
    for N in (24, 7):
        problem = LoRALinearProblem(
            6, 5000, 900, N, 4, torch.float32, torch.float32, options=("base_in_scale", "base_out_scale")
        )
        assert_same_bits(problem, "vendor", torch.get_num_threads())

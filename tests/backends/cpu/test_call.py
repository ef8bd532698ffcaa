"""lora_linear's native calls: against the fp64 oracle, ragged and empty shapes, every subset of gradients, scratch."""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from peftkern.backends.cpu import call, native
from peftkern.testing.accuracy import check, run_ours
from peftkern.testing.problems import DROPOUT_SEED, LoRALinearProblem, random_problem

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

HALF = (torch.bfloat16, torch.float16)
SCALES = ("rank_scale", "base_in_scale", "delta_in_scale", "base_out_scale", "delta_out_scale")


def unit_stride(weight: Tensor | None) -> bool:
    return weight is not None and 1 in weight.stride()


def takes(kind: str, dtype: torch.dtype, M: int, unit: bool, scaled: bool) -> str:
    """``kind``, or what takes its place where it cannot compute a product."""
    if kind == "few" and (M > native._C.base_few_rows or not unit):
        return "panels"
    if kind == "bf16" and (dtype != torch.bfloat16 or scaled or not native._C.base_gemm_bf16_usable()):
        return "panels"
    return kind


class Native(torch.autograd.Function):
    """Both passes as the layers above make them: the call is unknown at first, then learnt."""

    @staticmethod
    def forward(ctx, settings, kind, x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, *scales):
        _, _, _, _, need_A, need_B, need_bias, _, _, _, *need_scales = ctx.needs_input_grad
        need_base_out = need_scales[3]
        rows = x.shape[:-1].numel()
        args = (
            settings, torch.get_num_threads(), x, "dense", weight, lora_A, lora_B, bias, scaling, dropout_p, seed,
            scales if any(s is not None for s in scales) else None, True, need_base_out,
        )  # fmt: skip
        assert call.forward(*args) is None
        scaled = scales[1] is not None
        assert call.learn_forward(*args, takes(kind, x.dtype, rows, unit_stride(weight), scaled))
        y, u, h = call.forward(*args)
        assert u.shape == (rows, lora_A.shape[0]) and (h is not None) == need_base_out
        ctx.save_for_backward(x, weight, lora_A, lora_B, u, h, seed, *scales)
        ctx.call = settings, kind, scaling, dropout_p
        ctx.bias_dtype = bias.dtype if bias is not None else None
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, u, h, seed, *scales = ctx.saved_tensors
        settings, kind, scaling, dropout_p = ctx.call
        _, _, need_x, _, need_A, need_B, need_bias, _, _, _, *need_scales = ctx.needs_input_grad
        need = (need_x, need_A, need_B, need_bias, *need_scales)
        args = (
            settings, torch.get_num_threads(), dy, x, u, h, "dense", weight, lora_A, lora_B, scaling, dropout_p, seed,
            tuple(scales) if any(s is not None for s in scales) else None,
            sum(1 << i for i, needed in enumerate(need) if needed),
            x.shape[-1], lora_A.shape[0], lora_A.dtype,
        )  # fmt: skip
        assert call.backward(*args) is None
        rows, scaled = x.shape[:-1].numel(), scales[3] is not None
        assert call.learn_backward(*args, takes(kind, x.dtype, rows, unit_stride(weight), scaled))
        dx, dA, dB, dbias, *dscales = call.backward(*args)
        dbias = dbias.to(ctx.bias_dtype) if need_bias else None
        dscales = [g.to(s.dtype) if g is not None else None for g, s in zip(dscales, scales, strict=True)]
        for grad, needed in zip((dx, dA, dB, dbias, *dscales), need, strict=True):
            assert (grad is not None) == needed
        return None, None, dx, None, dA, dB, dbias, None, None, None, *dscales


@dataclasses.dataclass(frozen=True)
class NativeProblem(LoRALinearProblem):
    """A problem whose y comes from the native calls."""

    kind: str = "panels"

    def ours(self, t: dict[str, Tensor]) -> Tensor:
        """y, with its gradients."""
        seed = torch.tensor([DROPOUT_SEED]) if self.dropout_p else None
        return Native.apply(
            object(), self.kind, t["x"], t["weight"], t["lora_A"], t["lora_B"], t.get("bias"), self.scaling,
            self.dropout_p, seed, *(t.get(name) for name in SCALES),
        )  # fmt: skip


def native_problem(problem: LoRALinearProblem, kind: str) -> NativeProblem:
    fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    return NativeProblem(**fields, kind=kind)


def assert_accurate(problem) -> None:
    bad = [row for row in check(problem) if not row.ok]
    assert not bad, f"{problem}\n" + "\n".join(f"{row.ratio:.2f} {row}" for row in bad)


@pytest.mark.parametrize("kind", ["vendor", "panels", "few", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_accuracy_of_random_problems(level, exports, kind, dtype):
    # The vendor's half-precision product is seconds per call on some CPUs: it gets small problems.
    small = kind == "vendor" and dtype in HALF
    limits = dict(max_M=48, max_KN=150) if small else dict(max_M=64 if kind == "few" else 300, max_KN=500, max_R=80)
    for seed in range(6):
        problem = random_problem(4000 + seed, dtype, **limits)
        # A transposed x of three dimensions and more has no constant step from row to row.
        assert_accurate(native_problem(problem, kind))


@pytest.mark.parametrize(
    "M, K, N, R", [(0, 5, 7, 3), (4, 0, 7, 3), (4, 5, 0, 3), (4, 5, 7, 0), (4, 0, 0, 0), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("kind", ["vendor", "panels"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty_shapes(exports, M, K, N, R, kind, dropout_p):
    options = ("bias", *SCALES)
    problem = LoRALinearProblem(
        1, M, K, N, R, torch.float32, torch.float32, scaling=0.5, dropout_p=dropout_p, options=options
    )
    assert_accurate(native_problem(problem, kind))


def assert_close(y: Tensor, want: Tensor) -> None:
    assert y.shape == want.shape
    torch.testing.assert_close(y.detach().double(), want, rtol=2e-5, atol=2e-5)


def test_every_subset_of_gradients(exports):
    settings = object()
    # Each combination gives the bits that all of them together give.
    options = ("bias", *SCALES)
    problem = LoRALinearProblem(
        3, 11, 21, 18, 5, torch.float32, torch.float32, scaling=0.7, dropout_p=0.3, options=options
    )
    t = problem.tensors()
    scales, seed = tuple(t[name] for name in SCALES), torch.tensor([5])
    forward = (
        settings, 1, t["x"], "dense", t["weight"], t["lora_A"], t["lora_B"], t["bias"], 0.7, 0.3, seed, scales, True, True
    )  # fmt: skip
    assert call.learn_forward(*forward, "panels")
    _, u, h = call.forward(*forward)

    def gradients(needs: int):
        dx, du = needs & 33, needs & 115
        args = (
            settings, 1, t["dy"],
            t["x"] if needs & 98 else None,
            u if needs & 276 else None,
            h if needs & 128 else None,
            "dense",
            t["weight"] if dx else None,
            t["lora_A"] if dx or needs & 64 else None,
            t["lora_B"] if du or needs & 256 else None,
            0.7, 0.3, seed, scales, needs, 21, 5, torch.float32,
        )  # fmt: skip
        assert call.backward(*args) is None and call.learn_backward(*args, "panels")
        for i in range(3, 10):  # nothing that is read may be missing
            if args[i] is not None and i != 6:
                assert call.backward(*args[:i], None, *args[i + 1 :]) is None
        return call.backward(*args)

    # A trained d acts after the pass over dy, a fixed one within it.
    every = {16: gradients(511), 0: gradients(511 - 16)}
    for needs in (*(1 << i for i in range(9)), *range(0, 511, 7)):
        for i, (got, want) in enumerate(zip(gradients(needs), every[needs & 16], strict=True)):
            assert (got is not None) == bool(needs >> i & 1)
            assert got is None or torch.equal(got, want), (needs, i)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", ["panels", "few", "bf16"])
def test_threads_do_not_change_bits(kind, dtype):
    M, adapter = 60 if kind == "few" else 300, torch.float32
    problem = LoRALinearProblem(
        8, M, 290, 310, 7, dtype, adapter, scaling=0.5, dropout_p=0.2, options=("bias", *SCALES)
    )
    problem, results = native_problem(problem, kind), []
    names = ("x", "lora_A", "lora_B", "bias", *SCALES)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_ours(problem, problem.tensors(), names))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, value in other.items():
            assert torch.equal(value, results[0][name]), name


def test_the_branch_has_the_same_bits_beside_every_product(calls):
    t = calls.arguments(M=150, K=300, N=260, R=7)
    t["weight"].zero_()
    results = [calls.known(t | dict(threads=n), kind) for kind in ("vendor", "panels") for n in (1, 2)]
    assert all(torch.equal(y, results[0]) for y in results)


def test_identity_base(exports):
    settings = object()
    x, a, b = torch.randn(6, 40), torch.randn(4, 40), torch.randn(40, 4)
    p, g = torch.rand(40), torch.rand(40)
    scales = (None, p, None, g, None)
    args = (settings, 1, x, "identity", None, a, b, None, 0.5, 0.0, None, scales, True, True)
    with pytest.raises(ValueError, match="panels"):
        call.learn_forward(*args, "panels")
    assert call.learn_forward(*args, "identity")
    y, u, h = call.forward(*args)
    assert torch.equal(h, x * p)
    assert_close(y, g.double() * x.double() * p.double() + 0.5 * (x.double() @ a.double().t()) @ b.double().t())
    dy = torch.randn(6, 40)
    back = (
        settings,
        1,
        dy,
        x,
        u,
        h,
        "identity",
        None,
        a,
        b,
        0.5,
        0.0,
        None,
        scales,
        1 | 32 | 128,
        40,
        4,
        torch.float32,
    )
    assert call.learn_backward(*back, "identity")
    dx, *_, dbase_in, _, dbase_out, _ = call.backward(*back)
    d = dy.double()
    assert_close(dx, d * g * p + 0.5 * (d @ b.double()) @ a.double())
    assert_close(dbase_in, (d * g * x).sum(0))
    assert_close(dbase_out, (d * x * p).sum(0))
    # A K that is not N has no identity.
    assert not call.learn_forward(
        settings, 1, x, "identity", None, a, torch.randn(9, 4), None, 0.5, 0.0, None, None, False, False, "identity"
    )


def test_scratch_of_another_call_does_not_leak_in(calls):
    # A larger call fills the thread's scratch with NaN; nothing of it may reach a smaller one.
    t, nan = calls.arguments(M=7, K=50, N=40, R=6), calls.arguments(M=70, K=500, N=400, R=60)
    scales = tuple(torch.rand(n) for n in (6, 50, 50, 40, 40))
    for kind in ("vendor", "panels", "few"):
        call_of = t | dict(scales=scales, bias=torch.randn(40))
        before = calls.known(call_of, kind)
        for name in ("x", "weight", "lora_A", "lora_B"):
            nan[name].fill_(math.nan)
        calls.known(nan, "panels")
        assert torch.equal(calls.forward(call_of), before)


def test_a_call_that_needs_more_scratch_than_is_kept(calls):
    # Twice: the second finds what the first one left.
    t = calls.arguments(M=40000, K=8, N=8, R=450)
    t["lora_A"] *= 0.05
    first = calls.known(t)
    assert torch.equal(calls.forward(t), first)
    assert_close(first[:64], calls.expected(t | dict(x=t["x"][:64])))


def test_threads_of_python_get_scratch_of_their_own(calls):
    each = [calls.arguments(M=20 + i, K=90, N=70, R=5) for i in range(4)]
    want = [calls.known(t) for t in each]

    def work(i: int) -> bool:
        return all(torch.equal(calls.forward(each[i]), want[i]) for _ in range(60))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))

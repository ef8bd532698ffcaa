"""lora_linear's native calls: against the fp64 oracle, ragged and empty shapes, what is not taken, and whose plan is used."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from peftkern.backends.cpu import call, native
from peftkern.testing.accuracy import check
from peftkern.testing.problems import DROPOUT_SEED, LoRALinearProblem, random_problem

pytestmark = pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")

HALF = (torch.bfloat16, torch.float16)
SCALES = ("rank_scale", "base_in_scale", "delta_in_scale", "base_out_scale", "delta_out_scale")


class Settings:
    """An object of its own for each test: plans are looked up by identity."""


@pytest.fixture
def settings():
    return Settings()


@pytest.fixture(params=[True, False], ids=["exports", "python"])
def exports(request):
    """With and without what torch's libraries export; without, results come from poisoned memory."""
    assert call.set_up(exports=request.param) is None
    yield request.param
    call.set_up()


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
            settings, torch.get_num_threads(), x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed,
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
            settings, torch.get_num_threads(), dy, x, u, h, weight, lora_A, lora_B, scaling, dropout_p, seed,
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
            Settings(), self.kind, t["x"], t["weight"], t["lora_A"], t["lora_B"], t.get("bias"), self.scaling,
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


def tensors(M=5, K=20, N=9, R=3, dtype=torch.float32, adapter=None, **changes) -> dict[str, object]:
    """Arguments of a plain forward call, in order; ``changes`` replace some."""
    adapter = adapter or dtype
    t = dict(
        threads=1, x=torch.randn(M, K).to(dtype), weight=torch.randn(N, K).to(dtype),
        lora_A=torch.randn(R, K).to(adapter), lora_B=torch.randn(N, R).to(adapter), bias=None, scaling=2.0,
        dropout_p=0.0, seed=None, scales=None, want_u=False, want_h=False,
    )  # fmt: skip
    return t | changes


def known(settings, t, kind="panels") -> Tensor:
    """y of a call that is learnt now."""
    assert call.learn_forward(settings, *t.values(), kind)
    y = call.forward(settings, *t.values())
    assert y is not None
    return y


def expected(t) -> Tensor:
    """y of a plain call in fp64."""
    x, w, a, b = (t[k].detach().double() for k in ("x", "weight", "lora_A", "lora_B"))
    return x @ w.t() + t["scaling"] * (x @ a.t()) @ b.t()


def assert_close(y: Tensor, want: Tensor) -> None:
    assert y.shape == want.shape
    torch.testing.assert_close(y.detach().double(), want, rtol=2e-5, atol=2e-5)


def test_every_subset_of_gradients(settings, exports):
    # Each combination gives the bits that all of them together give.
    options = ("bias", *SCALES)
    problem = LoRALinearProblem(
        3, 11, 21, 18, 5, torch.float32, torch.float32, scaling=0.7, dropout_p=0.3, options=options
    )
    t = problem.tensors()
    scales, seed = tuple(t[name] for name in SCALES), torch.tensor([5])
    forward = (
        settings, 1, t["x"], t["weight"], t["lora_A"], t["lora_B"], t["bias"], 0.7, 0.3, seed, scales, True, True
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
            t["weight"] if dx else None,
            t["lora_A"] if dx or needs & 64 else None,
            t["lora_B"] if du or needs & 256 else None,
            0.7, 0.3, seed, scales, needs, 21, 5, torch.float32,
        )  # fmt: skip
        assert call.backward(*args) is None and call.learn_backward(*args, "panels")
        for i in range(3, 9):  # nothing that is read may be missing
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
def test_threads_and_kinds_do_not_change_the_branch(settings, dtype):
    # Large enough for two threads; a zero W, so that the branch is all there is.
    t = tensors(M=150, K=300, N=260, R=7, dtype=dtype, adapter=torch.float32)
    t["weight"].zero_()
    kinds = ("vendor", "panels", "bf16") if dtype == torch.float32 else ("panels", "bf16")
    results = []
    for kind, threads in itertools.product(kinds, (1, 2)):
        call_of = t | dict(threads=threads)
        results.append(known(settings, call_of, takes(kind, dtype, 150, True, False)))
    assert all(torch.equal(y, results[0]) for y in results)


def test_identity_base(settings, exports):
    x, a, b = torch.randn(6, 40), torch.randn(4, 40), torch.randn(40, 4)
    p, g = torch.rand(40), torch.rand(40)
    scales = (None, p, None, g, None)
    args = (settings, 1, x, None, a, b, None, 0.5, 0.0, None, scales, True, True)
    with pytest.raises(ValueError, match="panels"):
        call.learn_forward(*args, "panels")
    assert call.learn_forward(*args, "identity")
    y, u, h = call.forward(*args)
    assert torch.equal(h, x * p)
    assert_close(y, g.double() * x.double() * p.double() + 0.5 * (x.double() @ a.double().t()) @ b.double().t())
    dy = torch.randn(6, 40)
    back = (settings, 1, dy, x, u, h, None, a, b, 0.5, 0.0, None, scales, 1 | 32 | 128, 40, 4, torch.float32)
    assert call.learn_backward(*back, "identity")
    dx, *_, dbase_in, _, dbase_out, _ = call.backward(*back)
    d = dy.double()
    assert_close(dx, d * g * p + 0.5 * (d @ b.double()) @ a.double())
    assert_close(dbase_in, (d * g * x).sum(0))
    assert_close(dbase_out, (d * x * p).sum(0))
    # A K that is not N has no identity.
    assert not call.learn_forward(
        settings, 1, x, None, a, torch.randn(9, 4), None, 0.5, 0.0, None, None, False, False, "identity"
    )


@pytest.mark.parametrize("layout", ["columns", "gaps", "offset", "expanded"])
def test_strides_of_every_operand(settings, exports, layout):
    def laid(t: Tensor) -> Tensor:
        if layout == "columns":
            return t.t().contiguous().t()
        if layout == "gaps":
            wide = torch.full((t.shape[0], 2 * t.shape[1] + 1), math.nan)
            wide[:, : 2 * t.shape[1] : 2] = t
            return wide[:, : 2 * t.shape[1] : 2]
        if layout == "offset":
            return torch.cat([torch.full((1, t.shape[1]), math.nan), t])[1:]
        return t[:1].expand(t.shape)

    for kind in ("vendor", "panels", "few"):
        t = tensors(M=7, K=33, N=21, R=5)
        t |= {name: laid(t[name]) for name in ("x", "weight", "lora_A", "lora_B")}
        kind = takes(kind, torch.float32, 7, unit_stride(t["weight"]), False)
        assert_close(known(settings, t, kind), expected(t))


def test_leading_dimensions(settings):
    for shape in ((20,), (2, 3, 20), (1, 5, 1, 20), (0, 3, 20), (3, 0, 20)):
        t = tensors(x=torch.randn(shape))
        y = known(settings, t)
        assert y.shape == (*shape[:-1], 9) and y.is_contiguous()
        assert_close(y.reshape(-1, 9), expected(t | dict(x=t["x"].reshape(-1, 20))))
    # Rows at no constant step are copied by the careful way.
    assert not call.learn_forward(settings, *tensors(x=torch.randn(3, 2, 20).transpose(0, 1)).values(), "panels")
    # But where there is only one step they are.
    sliced = torch.randn(4, 6, 20)[:, ::2][:, :1]
    t = tensors(x=sliced)
    assert_close(known(settings, t).reshape(-1, 9), expected(t | dict(x=sliced.reshape(-1, 20))))


def test_results_are_ordinary_tensors(settings, exports):
    t = tensors()
    y = known(settings, t)
    assert type(y) is Tensor and not y.requires_grad and not y.is_inference() and y.untyped_storage().resizable()
    assert y._version == 0 and y.is_leaf
    with torch.inference_mode():
        assert call.forward(settings, *t.values()).is_inference()
    with torch.no_grad():
        assert torch.equal(call.forward(settings, *t.values()), y)
    t["weight"] = torch.nn.Parameter(t["weight"])
    assert torch.equal(known(settings, t), y)
    wanted = t | dict(want_u=True)
    assert call.learn_forward(settings, *wanted.values(), "panels")
    again, u, h = call.forward(settings, *wanted.values())
    assert torch.equal(again, y) and u.dtype == torch.float32 and h is None


class Subclass(Tensor):
    pass


OTHERS = {
    "a subclass": lambda t: t.as_subclass(Subclass),
    "another device": lambda t: t.to("meta"),
    "a negative view": torch._neg_view,
    "a part of a conjugate": lambda t: torch.complex(t, t).conj().imag,
    "sparse": lambda t: t.to_sparse(),
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape),
    "fp64": lambda t: t.double(),
    "integers": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "one more column": lambda t: torch.cat([t, t[:, :1]], dim=1),
    "one more row": lambda t: torch.cat([t, t[:1]]),
    "one dimension": lambda t: t.flatten(),
    "no tensor": lambda t: 3,
    "None": lambda t: None,
}


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_ordinary_is_not_taken(settings, name, other):
    t = tensors()
    known(settings, t)
    changed = t | {name: OTHERS[other](t[name])}
    assert call.forward(settings, *changed.values()) is None
    if name == "x" and other == "one more row":
        return  # another M: a call of its own
    assert call.learn_forward(settings, *changed.values(), "panels") is False


@pytest.mark.parametrize("name, value", [
    ("threads", 0), ("threads", "two"), ("bias", torch.randn(8)), ("bias", torch.randn(9).double()), ("scaling", "one"),
    ("dropout_p", 1.0), ("dropout_p", -0.1), ("dropout_p", math.nan), ("dropout_p", 0.5), ("scales", (None,) * 4),
    ("scales", [None] * 5), ("scales", (torch.randn(9),) + (None,) * 4), ("bias", torch.randn(9).bfloat16()),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_not_taken(settings, name, value):
    t = tensors() | {name: value}
    assert call.learn_forward(settings, *t.values(), "panels") is False
    assert call.forward(settings, *t.values()) is None
    assert call.forward(settings, 1) is None and call.forward() is None


def test_a_seed_that_does_not_fit_is_not_taken(settings):
    for seed in (
        None,
        3,
        torch.tensor([3], dtype=torch.int32),
        torch.tensor([3, 4]),
        torch.tensor([3.0]),
        torch.empty(0).long(),
    ):
        assert call.learn_forward(settings, *tensors(dropout_p=0.5, seed=seed).values(), "panels") is False
    assert call.learn_forward(settings, *tensors(dropout_p=0.5, seed=torch.tensor(3)).values(), "panels") is True


def test_no_plan_is_stale(settings):
    t = tensors(M=5, K=20, N=9, R=3)
    known(settings, t)
    others = [
        tensors(M=6), tensors(K=21), tensors(N=10), tensors(R=4), tensors(bias=torch.randn(9)), tensors(threads=2),
        tensors(dropout_p=0.1, seed=torch.tensor([1])), tensors(scales=(torch.randn(3),) + (None,) * 4),
        tensors(want_u=True), tensors(want_h=True), tensors(dtype=torch.bfloat16),
        tensors(dtype=torch.bfloat16, adapter=torch.float32),
    ]  # fmt: skip
    for other in others:
        assert call.forward(settings, *other.values()) is None
    assert call.forward(Settings(), *t.values()) is None
    assert call.forward(settings, *t.values()) is not None
    # Memory and dtype may change behind a parameter's back.
    w = t["weight"] = torch.nn.Parameter(t["weight"], requires_grad=False)
    known(settings, t)
    w.data = torch.randn(9, 20)
    assert_close(call.forward(settings, *t.values()), expected(t))
    w.data = torch.randn(9, 40)[:, ::2]
    assert call.forward(settings, *t.values()) is None, "other strides are another choice"
    w.data = torch.randn(10, 20)
    assert call.forward(settings, *t.values()) is None
    w.data = torch.randn(9, 20).bfloat16()
    assert call.forward(settings, *t.values()) is None


def test_a_plan_holds_for_one_instruction_set(settings):
    t = tensors()
    known(settings, t)
    if native._C.isa() == "plain":
        pytest.skip("this CPU has one level")
    native._C.set_isa("plain")
    try:
        assert call.forward(settings, *t.values()) is None
    finally:
        native._C.set_isa("auto")
    assert call.forward(settings, *t.values()) is not None


def test_kinds_that_cannot_compute_a_product_are_refused(settings):
    t = tensors()
    for kind in ("identity", "given", "", "bf16"):
        with pytest.raises(ValueError, match="cannot be computed"):
            call.learn_forward(settings, *t.values(), kind)
    with pytest.raises(ValueError, match="few"):
        call.learn_forward(settings, *tensors(M=native._C.base_few_rows + 1).values(), "few")
    with pytest.raises(ValueError, match="few"):
        call.learn_forward(settings, *tensors(weight=torch.randn(18, 40)[::2, ::2]).values(), "few")
    with pytest.raises(TypeError):
        call.learn_forward(settings, *t.values(), 3)
    assert call.forward(settings, *t.values()) is None


def test_plans_are_forgotten_before_they_are_too_many():
    t = tensors(M=1, K=1, N=1, R=1)
    kept = Settings()
    known(kept, t)
    for _ in range(2):
        for _ in range(4096):
            assert call.learn_forward(Settings(), *t.values(), "panels")
    assert call.forward(kept, *t.values()) is None
    native._C.lora_linear_forget()


def test_scratch_of_another_call_does_not_leak_in(settings):
    # A larger call fills the thread's scratch with NaN; nothing of it may reach a smaller one.
    t, nan = tensors(M=7, K=50, N=40, R=6), tensors(M=70, K=500, N=400, R=60)
    scales = tuple(torch.rand(n) for n in (6, 50, 50, 40, 40))
    for kind in ("vendor", "panels", "few"):
        call_of = t | dict(scales=scales, bias=torch.randn(40))
        before = known(settings, call_of, kind)
        for name in ("x", "weight", "lora_A", "lora_B"):
            nan[name].fill_(math.nan)
        known(settings, nan, "panels")
        assert torch.equal(call.forward(settings, *call_of.values()), before)


def test_a_call_that_needs_more_scratch_than_is_kept(settings):
    # Twice: the second finds what the first one left.
    t = tensors(M=40000, K=8, N=8, R=450)
    t["lora_A"] *= 0.05
    first = known(settings, t)
    assert torch.equal(call.forward(settings, *t.values()), first)
    assert_close(first[:64], expected(t | dict(x=t["x"][:64])))


def test_threads_of_python_get_scratch_of_their_own(settings):
    from concurrent.futures import ThreadPoolExecutor

    calls = [tensors(M=20 + i, K=90, N=70, R=5) for i in range(4)]
    want = [known(settings, t) for t in calls]

    def work(i: int) -> bool:
        return all(torch.equal(call.forward(settings, *calls[i].values()), want[i]) for _ in range(60))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))

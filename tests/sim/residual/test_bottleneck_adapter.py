"""bottleneck_adapter on the CUDA back end, run by the simulator: against fp64, any subset, any layout, bit against bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from peftkern.activations import ACTIVATIONS
from peftkern.backends.cuda import OPS, decline
from peftkern.ops.bottleneck_adapter import (
    Bottleneck,
    BottleneckGrad,
    BottleneckNeeds,
    bottleneck_adapter_bwd_ref,
    bottleneck_adapter_fwd_ref,
)
from peftkern.problem import Problem
from peftkern.settings import current

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SEED = torch.tensor([-(2**40) + 7])
fwd, bwd = OPS["bottleneck_adapter_fwd"], OPS["bottleneck_adapter_bwd"]
OPTIONS = ("down_bias", "up_bias", "gate", "out_scale", "residual")
# Half a unit in the last place, and what is left of fp32 sums of values as two bf16 terms.
ROUNDING = {F32: 0.0, BF16: 2.0**-8, F16: 2.0**-11}
SUMS = 3e-5


def arguments(
    M, N, K, R, dtype=BF16, adapter=F32, activation="gelu", options=OPTIONS, p=0.0, on_input=False, scaling=-1.5, seed=0
) -> tuple[Bottleneck, torch.Tensor]:
    """A forward pass and its dy; N is K where h is the residual."""
    gen = torch.Generator().manual_seed(seed + M + N + K + R)
    N = N if "residual" in options else K

    def normal(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(*shape, generator=gen) * scale).to(dtype)

    def vector(name, size, dtype=F32):
        return normal(size, dtype=dtype) if name in options else None

    c = Bottleneck(
        normal(M, K), normal(M, N) if "residual" in options else None,
        normal(R, K, dtype=adapter, scale=max(K, 1) ** -0.5), normal(N, R, dtype=adapter, scale=max(R, 1) ** -0.5),
        vector("down_bias", R, adapter), vector("up_bias", N, adapter), vector("gate", M), vector("out_scale", N, dtype),
        activation, scaling, p, on_input, SEED if p > 0 else None,
    )  # fmt: skip
    return c, normal(M, N)


def gradient(c: Bottleneck, dy, t, needs=BottleneckNeeds._fields) -> BottleneckGrad:
    """The backward pass of a forward's arguments, for what they have."""
    has = {"down_bias": c.down_bias, "up_bias": c.up_bias, "gate": c.gate, "out_scale": c.out_scale}
    needed = [name in needs and has.get(name, c.h) is not None for name in BottleneckNeeds._fields]
    return BottleneckGrad(dy, c.h, t, c.down, c.up, *c[5:], c.residual is None, needed)


def mapped(value, make):
    """Arguments with ``make`` of their floating-point tensors."""
    return type(value)(*(make(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in value))


def assert_right(got, expected) -> None:
    for ours, right in zip(got, expected, strict=True):
        assert ours.shape == right.shape
        if right.numel():
            size = right.abs()
            error, bound = (ours.double() - right).abs(), ROUNDING[ours.dtype] * size + SUMS * size.max()
            assert (error <= bound).all(), (error / bound).max()


def check(c, dy, needs=BottleneckNeeds._fields) -> None:
    """Both passes, the second from the t of the first."""
    y, t = fwd(c)
    assert y.dtype == c.h.dtype and t.dtype == F32
    assert_right((y, t), bottleneck_adapter_fwd_ref(mapped(c, torch.Tensor.double)))
    g = gradient(c, dy, t, needs)
    grads = bwd(g)
    assert [grad.dtype for grad in grads] == [dy.dtype, c.down.dtype, c.up.dtype, *[F32] * 4]
    assert_right(grads, bottleneck_adapter_bwd_ref(mapped(g, torch.Tensor.double)))


# M, N, K, R: tails everywhere, whole tiles, more ranks than one chunk, few rows of many columns, one of each.
SIZES = [(70, 72, 136, 16), (5, 33, 41, 3), (70, 264, 64, 48), (20, 24, 56, 130), (3, 1100, 2056, 5), (1, 1, 1, 1)]
KINDS = [(BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]


WAYS = [
    dict(),
    dict(activation="silu", options=("down_bias", "up_bias"), seed=1),
    dict(activation="tanh", options=(), p=0.3, on_input=True, seed=2),
    dict(activation="relu", options=("up_bias", "residual"), p=0.4, seed=3),
]


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=lambda i: str(KINDS[i]))
@pytest.mark.parametrize("size", range(len(SIZES)), ids=lambda i: str(SIZES[i]))
def test_against_fp64(device, size, kind):
    """Each pair of sizes, dtypes and ways is met, not each triple: two of the ways."""
    for way in ((size + kind) % 4, (size + kind + 2) % 4):
        check(*arguments(*SIZES[size], *KINDS[kind], **WAYS[way]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_slopes(device, activation):
    """Of t itself: h has one column, D and U are 1 and the residual is 0; NaN stays."""
    t = torch.cat([torch.logspace(-6, 1.6, 90), -torch.logspace(-6, 1.6, 90), torch.tensor([0.0, 100.0, -100.0])])
    h, one = t.to(F16)[:, None], torch.ones(1, 1)
    c = Bottleneck(h, torch.zeros_like(h), one, one, None, None, None, None, activation, 1.0, 0.0, False, None)
    y, kept = fwd(c)
    assert torch.equal(kept, h.float())
    g = gradient(c, torch.ones_like(h), kept, ("h", "down_bias"))._replace(needs=[True, *[False] * 6])
    f, exact = ACTIVATIONS[activation], kept.double()
    for ours, right in ((y, f.value(exact)), (bwd(g)[0], f.slope(exact))):
        # Rounded to fp16, of 16 bits of v; in fp32 the cancellation that the definition has where f vanishes.
        bound = (2.0**-11 + 2.0**-16) * right.abs() + 2.0**-25 + 2e-7 * exact.abs().clamp(min=1)
        error = (ours - right).abs()
        assert (error <= bound).all(), (kept[error > bound], error[error > bound])
    broken = c._replace(h=torch.full((1, 1), float("nan"), dtype=F16), residual=c.residual[:1])
    assert fwd(broken)[0].isnan().all()


@pytest.mark.parametrize("options, drop", [(OPTIONS, ""), (OPTIONS, "out"), (("up_bias",), ""), (("gate",), "in")])
def test_subsets_of_gradients(device, options, drop):
    p = 0.25 if drop else 0.0
    c, dy = arguments(21, 33, 40, 5, F16, options=options, p=p, on_input=drop == "in")
    for count in (0, 1, 2):
        for names in itertools.combinations(BottleneckNeeds._fields, count):
            check(c, dy, names)


@pytest.mark.parametrize("m, n, k, r", [(0, 5, 7, 3), (3, 0, 7, 2), (3, 5, 0, 2), (3, 5, 7, 0)])
def test_empty_sizes(device, m, n, k, r):
    check(*arguments(m, n, k, r, activation="sigmoid", p=0.5))
    check(*arguments(m, n, k, r, activation="sigmoid", options=("up_bias", "residual")))


@pytest.mark.parametrize("layout", ["transposed", "padded", "misaligned"])
def test_any_layout(device, layout):
    def lay_out(a: torch.Tensor) -> torch.Tensor:
        if a.dim() == 1:
            return torch.stack([a, torch.full_like(a, float("nan"))], 1)[:, 0]
        if layout == "transposed":
            return a.t().contiguous().t()
        wide = torch.full((a.shape[0], a.shape[1] + (8 if layout == "padded" else 3)), float("nan"), dtype=a.dtype)
        first = 0 if layout == "padded" else 1
        wide[:, first : first + a.shape[1]] = a
        return wide[:, first : first + a.shape[1]]

    for adapter in (F32, BF16):
        c, dy = arguments(37, 72, 40, 20, BF16, adapter, p=0.2)
        check(mapped(c, lay_out), lay_out(dy))


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("sizes", [(65, 70, 41, 19), (16, 264, 64, 16)], ids=str)
def test_nothing_is_touched_beside_a_tensor(device, sim, sizes, at_end):
    with sim.memory(at_end=at_end) as memory:

        def guarded(t: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(memory.put(t.contiguous().view(torch.uint8).numpy()).array).view(t.dtype)

        c, dy = arguments(*sizes, F16, F16, p=0.25)
        c, dy = mapped(c, guarded), guarded(dy)
        check(c, dy)
        del c, dy


@pytest.mark.parametrize("dtype, adapter, R", [(BF16, F32, 20), (F16, F16, 70)])
def test_a_row_does_not_depend_on_the_others(device, dtype, adapter, R):
    c, dy = arguments(150, 72, 72, R, dtype, adapter, options=("gate", "up_bias"), p=0.25)
    y, t = fwd(c)
    for rows in (1, 5, 64, 67):
        few = c._replace(h=c.h[:rows], gate=c.gate[:rows])
        assert all(torch.equal(a, b[:rows]) for a, b in zip(fwd(few), (y, t), strict=True))
        grads = bwd(gradient(few, dy[:rows], t[:rows], ("h", "gate")))
        whole = bwd(gradient(c, dy, t, ("h", "gate")))
        assert all(torch.equal(grads[i], whole[i][:rows]) for i in (0, 5))


@pytest.mark.parametrize("mode", list(itertools.product((0, 1), repeat=2)))
def test_every_schedule_gives_the_same_bits(device, sim, mode):
    c, dy = arguments(140, 300, 72, 20, p=0.2)
    results = []
    for seed, resident in ((0, 0), (1, 1), (2, 2)):
        sim.configure(seed=seed, mode=mode, resident=resident)
        y, t = fwd(c)
        results.append((y, t, *bwd(gradient(c, dy, t))))
    sim.configure()
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_dropped_elements_contribute_exactly_nothing(device):
    c, dy = arguments(21, 33, 40, 5, F16, p=0.5, on_input=True)
    keep = torch.ops.peftkern.dropout_mask(SEED, 21, 40, 0.5)
    clean, broken = (c._replace(h=torch.where(keep, c.h, value)) for value in (0.0, float("nan")))
    (y, t), expected = fwd(broken), fwd(clean)
    assert torch.equal(y, expected[0]) and torch.equal(t, expected[1])
    needs = ("h", "down")
    pairs = zip(bwd(gradient(broken, dy, t, needs)), bwd(gradient(clean, dy, t, needs)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "dtype, R, M, reason", [(F32, 8, 4, "bfloat16 and float16"), (BF16, 513, 4, "over 512"), (F16, 8, 2**31, "2^31")]
)
def test_what_goes_to_another_back_end(dtype, R, M, reason):
    for op in ("bottleneck_adapter_fwd", "bottleneck_adapter_bwd"):
        problem = Problem(op, "cuda", "sm_90", dtype, dtype, M, 40, 24, R, frozenset({"gelu"}))
        assert reason in decline(problem, current())

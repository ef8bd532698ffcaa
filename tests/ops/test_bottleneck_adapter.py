"""bottleneck_adapter and its gradients as ops: the equation, every option, any shape and layout, bad input, any dtype."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import peftkern.ops.bottleneck_adapter as op
from peftkern.activations import ACTIVATIONS, CODES, activation_name
from peftkern.ops.dropout_mask import dropout_mask_ref
from peftkern.testing.accuracy import check
from peftkern.testing.bottleneck_problems import OPTIONS, BottleneckProblem, random_bottleneck_problem

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
fwd, bwd = torch.ops.peftkern.bottleneck_adapter_fwd, torch.ops.peftkern.bottleneck_adapter_bwd
SEED = torch.tensor([77])
ALL = [True] * 7


@pytest.fixture(autouse=True, params=["reference", "auto"])
def backend(request, monkeypatch):
    """The definition, and what a user gets."""
    monkeypatch.setenv("PEFTKERN_BACKEND", request.param)
    return request.param


def arguments(M=6, K=5, N=5, R=3, dtype=F64, matrices=None, names=(), **options) -> op.Bottleneck:
    """A call with these optional tensors, random throughout."""
    g = torch.Generator().manual_seed(M + K + N + R)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=F64).to(dtype)

    shapes = {"residual": (M, N), "down_bias": (R,), "up_bias": (N,), "gate": (M,), "out_scale": (N,)}
    tensors = {n: normal(*shape) if n in names else None for n, shape in shapes.items()}
    defaults = dict(activation="gelu", scaling=1.5, dropout_p=0.0, on_input=False, seed=SEED)
    down, up = normal(R, K, dtype=matrices or dtype), normal(N, R, dtype=matrices or dtype)
    return op.Bottleneck(h=normal(M, K), down=down, up=up, **tensors, **(defaults | options))


def gradient_arguments(c: op.Bottleneck, t, dy, needs=ALL) -> op.BottleneckGrad:
    return op.BottleneckGrad(
        dy, c.h, t, c.down, c.up, c.up_bias, c.gate, c.out_scale, c.activation, c.scaling, c.dropout_p, c.on_input,
        c.seed, c.residual is None, needs,
    )  # fmt: skip


def scalar(activation: str, t: float) -> tuple[float, float]:
    """f(t) and f'(t), from Python's own functions."""
    s = 1 / (1 + math.exp(-t))
    normal = 0.5 * (1 + math.erf(t / math.sqrt(2)))
    c = math.sqrt(2 / math.pi)
    h = math.tanh(c * (t + 0.044715 * t**3))
    return {
        "identity": (t, 1.0),
        "relu": (max(t, 0.0), float(t > 0)),
        "leaky_relu": (t if t > 0 else 0.01 * t, 1.0 if t > 0 else 0.01),
        "gelu": (t * normal, normal + t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)),
        "gelu_tanh": (0.5 * t * (1 + h), 0.5 * (1 + h) + 0.5 * t * (1 - h * h) * c * (1 + 3 * 0.044715 * t * t)),
        "silu": (t * s, s * (1 + t * (1 - s))),
        "tanh": (math.tanh(t), 1 - math.tanh(t) ** 2),
        "sigmoid": (s, s * (1 - s)),
    }[activation]


def by_element(c: op.Bottleneck) -> torch.Tensor:
    """y, a number at a time, in Python's floats."""
    (M, K), (N, R) = c.h.shape, c.up.shape
    keep = dropout_mask_ref(c.seed, M, K if c.on_input else N, c.dropout_p) if c.dropout_p else None
    y = torch.zeros(M, N, dtype=F64)
    for m in range(M):
        row = [c.h[m, k].item() for k in range(K)]
        if c.on_input and keep is not None:
            row = [x / (1 - c.dropout_p) if kept else 0.0 for x, kept in zip(row, keep[m])]
        z = []
        for r in range(R):
            t = sum(x * c.down[r, k].item() for k, x in enumerate(row))
            z.append(scalar(c.activation, t + (0.0 if c.down_bias is None else c.down_bias[r].item()))[0])
        for n in range(N):
            o = sum(v * c.up[n, r].item() for r, v in enumerate(z)) + (
                0.0 if c.up_bias is None else c.up_bias[n].item()
            )
            o *= c.scaling * (1.0 if c.out_scale is None else c.out_scale[n].item())
            if keep is not None and not c.on_input:
                o = o / (1 - c.dropout_p) if keep[m, n] else 0.0
            o *= 1.0 if c.gate is None else c.gate[m].item()
            y[m, n] = o + (c.h if c.residual is None else c.residual)[m, n].item()
    return y


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    t = torch.cat([torch.linspace(-9, 9, 181, dtype=F64), torch.tensor([-80.0, 80.0, 1e-9, -1e-9], dtype=F64)])
    values, slopes = zip(*(scalar(activation, v.item()) for v in t))
    f = ACTIVATIONS[activation]
    torch.testing.assert_close(f.value(t), torch.tensor(values, dtype=F64), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(f.slope(t), torch.tensor(slopes, dtype=F64), rtol=1e-10, atol=1e-14)
    wide = torch.tensor([-1e4, 1e4, 0.0])
    assert f.value(wide).isfinite().all() and f.slope(wide).isfinite().all()
    at_zero = torch.zeros(1, dtype=F64, requires_grad=True)
    assert torch.equal(torch.autograd.grad(f.value(at_zero), at_zero)[0], f.slope(at_zero.detach()))


def test_names_of_activations():
    assert list(CODES.values()) == list(range(len(ACTIVATIONS)))
    assert [activation_name(n) for n in ("swish", "gelu_new", "leakyrelu", "linear")] == [
        "silu", "gelu_tanh", "leaky_relu", "identity",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="activation is 'swiglu'"):
        activation_name("swiglu")
    with pytest.raises(TypeError, match="activation must be a string, got int"):
        activation_name(3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_equation(activation):
    for names, options in (
        ((), {}),
        (("down_bias", "up_bias"), {"scaling": 0.0}),
        (("residual", "gate", "out_scale", "up_bias"), {"dropout_p": 0.4}),
        (("residual", "down_bias", "out_scale", "gate"), {"dropout_p": 0.4, "on_input": True}),
    ):
        c = arguments(N=7 if "residual" in names else 5, names=names, activation=activation, **options)
        y, t = fwd(*c)
        torch.testing.assert_close(y, by_element(c), rtol=1e-12, atol=1e-12)
        assert t.shape == (6, 3)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(name, activation):
    """Each option beside all others and alone, against autograd through the oracle."""
    for options in ((name,), tuple(OPTIONS)):
        N = 9 if "residual" in options else 6
        for dropout_p, dropout_on in ((0.0, "output"), (0.5, "output"), (0.5, "input")):
            p = BottleneckProblem(1, 12, 6, N, 4, F32, F32, activation, 0.7, dropout_p, dropout_on, options)
            bad = [row for row in check(p) if not row.ok]
            assert not bad, f"{p}\n{bad}"


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_accuracy_of_random_problems(dtype):
    for seed in range(12):
        p = random_bottleneck_problem(500 + seed, dtype, max_M=200, max_KN=300, max_R=80)
        bad = [row for row in check(p) if not row.ok]
        assert not bad, f"{p}\n{bad}"


def test_only_what_is_needed_is_computed():
    c = arguments(names=("residual", "down_bias", "up_bias", "gate", "out_scale"), N=4, dropout_p=0.5)
    y, t = fwd(*c)
    whole = bwd(*gradient_arguments(c, t, y))
    assert [g.shape for g in whole] == [
        v.shape for v in (c.h, c.down, c.up, c.down_bias, c.up_bias, c.gate, c.out_scale)
    ]
    for i in range(7):
        needs = [j == i for j in range(7)]
        some = gradient_arguments(c, t, y, needs)
        some = some if needs[1] else some._replace(h=None)
        for j, (got, expected) in enumerate(zip(bwd(*some), whole)):
            assert torch.equal(got, expected) if i == j else got.numel() == 0


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision_is_rounded_once(dtype):
    c = arguments(20, 30, 30, 8, dtype, F32, names=("up_bias", "gate"))
    y, t = fwd(*c)
    wide = c._replace(
        **{n: v.double() for n, v in c._asdict().items() if isinstance(v, torch.Tensor) and v is not SEED}
    )
    exact, exact_t = fwd(*wide)
    assert (y.dtype, t.dtype, exact_t.dtype) == (dtype, F32, F64)
    ulp = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(exact.abs()))
    assert ((y.double() - exact).abs() <= 0.5 * ulp + 1e-5).all()
    dh, ddown, dup, *vectors = bwd(*gradient_arguments(c, t, y))
    assert (dh.dtype, ddown.dtype, dup.dtype) == (dtype, F32, F32) and all(v.dtype == F32 for v in vectors)


SHAPES = [
    (0, 5, 5, 3),
    (6, 5, 5, 0),
    (6, 0, 4, 3),
    (6, 5, 0, 3),
    (1, 1, 1, 1),
    (0, 0, 0, 0),
    (3, 1, 9, 20),
    (257, 33, 33, 17),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(shape):
    M, K, N, R = shape
    names = ("residual", "down_bias", "up_bias", "gate", "out_scale")
    for dtype in (F32, BF16):
        p = BottleneckProblem(4, M, K, N, R, dtype, F32, "gelu", 0.7, 0.3, "output", names)
        assert all(row.ok for row in check(p))
        c = arguments(M, K, N, R, dtype, F32, names)
        y, t = fwd(*c)
        assert y.shape == (M, N) and y.isfinite().all()
        grads = bwd(*gradient_arguments(c, t, y))
        expected = [v.shape for v in (c.h, c.down, c.up, c.down_bias, c.up_bias, c.gate, c.out_scale)]
        assert [g.shape for g in grads] == expected and all(g.isfinite().all() for g in grads)
        if M == 0:
            assert all(not g.any() for g in grads)
        if R == 0:
            plain = c.residual.float() + c.gate.float()[:, None] * 1.5 * (c.out_scale.float() * c.up_bias.float())
            torch.testing.assert_close(y, plain.to(dtype))


def test_any_layout():
    base = BottleneckProblem(3, 30, 20, 20, 5, F32, F32, "gelu", 0.7, 0.25, "output", ("up_bias", "gate"))
    for layout in ("row_stride", "transposed", "nd"):
        for matrices in ("row_stride", "transposed"):
            p = dataclasses.replace(base, layout=layout, matrix_layout=matrices)
            bad = [row for row in check(p) if not row.ok]
            assert not bad, f"{p}\n{bad}"
    c = arguments(8, 6, 6, 4, F32, names=("gate", "out_scale", "up_bias"))
    y, t = fwd(*c)
    strided = {n: getattr(c, n).repeat_interleave(2)[::2] for n in ("gate", "out_scale", "up_bias")}
    torch.testing.assert_close(fwd(*c._replace(**strided)), (y, t))
    expanded = c._replace(gate=c.gate[:1].expand(8))
    torch.testing.assert_close(fwd(*expanded), fwd(*c._replace(gate=c.gate[:1].repeat(8))))
    dy = y[:1].expand(8, 6)
    torch.testing.assert_close(bwd(*gradient_arguments(c, t, dy)), bwd(*gradient_arguments(c, t, dy.contiguous())))


def test_what_is_dropped_contributes_nothing():
    """Not even as NaN."""
    c = arguments(8, 6, 6, 4, F32, dropout_p=0.5, on_input=True, names=("residual",))
    keep = dropout_mask_ref(SEED, 8, 6, 0.5)
    y, t = fwd(*c)
    poisoned = c._replace(h=torch.where(keep, c.h, math.nan))
    assert torch.equal(fwd(*poisoned)[0], y)
    grads = bwd(*gradient_arguments(c, t, y))
    assert torch.equal(grads[0] == 0, ~keep)
    assert torch.equal(bwd(*gradient_arguments(poisoned, t, y))[1], grads[1])


def test_opcheck():
    for names, N, p in ((("residual", "gate", "down_bias", "up_bias", "out_scale"), 4, 0.5), ((), 5, 0.0)):
        c = arguments(dtype=F32, names=names, N=N, dropout_p=p)
        torch.library.opcheck(fwd.default, tuple(c))
        y, t = fwd(*c)
        torch.library.opcheck(bwd.default, tuple(gradient_arguments(c, t, y)))
        torch.library.opcheck(bwd.default, tuple(gradient_arguments(c, t, y, [True] + [False] * 6)))


GOOD = arguments(dtype=F32, names=("residual", "gate", "down_bias", "up_bias", "out_scale"), N=4, dropout_p=0.5)
BAD = {
    "h is 1-D": ({"h": GOOD.h[0]}, ValueError, "h has shape"),
    "h is integer": ({"h": GOOD.h.long()}, TypeError, "h has dtype"),
    "down is 1-D": ({"down": GOOD.down[0]}, ValueError, r"down has shape \(5,\), expected \(R, K\)"),
    "down has other columns": ({"down": GOOD.down[:, 1:]}, ValueError, "down has shape"),
    "down is fp64": ({"down": GOOD.down.double()}, TypeError, "down has dtype"),
    "up is bf16": ({"up": GOOD.up.bfloat16()}, TypeError, "up has dtype"),
    "up has another rank": ({"up": GOOD.up[:, 1:]}, ValueError, "up has shape"),
    "up has other rows than h columns": ({"residual": None}, ValueError, "up has shape"),
    "residual is narrow": ({"residual": GOOD.residual[:, 1:]}, ValueError, "residual has shape"),
    "residual is bf16": ({"residual": GOOD.residual.bfloat16()}, TypeError, "residual has dtype"),
    "down_bias is long": ({"down_bias": GOOD.up_bias}, ValueError, "down_bias has shape"),
    "up_bias is short": ({"up_bias": GOOD.up_bias[1:]}, ValueError, "up_bias has shape"),
    "gate is short": ({"gate": GOOD.gate[1:]}, ValueError, "gate has shape"),
    "out_scale is elsewhere": ({"out_scale": GOOD.out_scale.to("meta")}, ValueError, "out_scale is on meta"),
    "activation is unknown": ({"activation": "glu"}, ValueError, "activation is 'glu'"),
    "dropout_p is 1": ({"dropout_p": 1.0}, ValueError, "dropout_p"),
    "no seed": ({"seed": None}, TypeError, "seed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, match = BAD[case]
    with pytest.raises(error, match=match):
        fwd(*GOOD._replace(**change))


def test_bad_input_of_the_gradient():
    y, t = fwd(*GOOD)
    good = gradient_arguments(GOOD, t, y)
    for change, error, match in (
        ({"dy": y[0]}, ValueError, "dy has shape"),
        ({"t": t[1:]}, ValueError, "t has shape"),
        ({"t": t.bfloat16()}, TypeError, "t has dtype"),
        ({"h": None}, TypeError, "h must be a tensor"),
        ({"h": GOOD.h[:, 1:]}, ValueError, "h has shape"),
        ({"through": True}, ValueError, "down has shape"),
    ):
        with pytest.raises(error, match=match):
            bwd(*good._replace(**change))

"""reft: each variant row by row, every gradient, positions of all kinds, what is saved, dtypes, a compiler."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from peftkern import dropout_mask, reft
from peftkern.autograd.residual.reft import VARIANTS
from peftkern.testing.accuracy import check

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
POSITIONS = torch.tensor([[2, -1, 0, 2], [-1, -1, -1, -1], [4, 3, 4, 1]])
DISTINCT = torch.tensor([[2, 0], [1, 4], [3, 2]])
NAMES = ("h", "rotate", "weight", "bias")


def operands(variant, dtype=F64, shape=(3, 5, 7), r=2, parameters=None) -> dict[str, torch.Tensor]:
    """Leaves of every argument that is differentiable."""
    H, parameters = shape[-1], parameters or dtype
    t = {"h": torch.randn(shape, dtype=F64).to(dtype)}
    sizes = {"rotate": (r, H), "weight": (r, H), "bias": (r,)}
    if not VARIANTS[variant].source:
        del sizes["weight"]
    t |= {n: torch.randn(size, dtype=F64).to(parameters) for n, size in sizes.items()}
    return {n: v.requires_grad_() for n, v in t.items()}


def row_by_row(t, positions, variant, activation="identity", dropout_p=0.0, seed=0):
    """The papers' formulas, a row at a time, so that autograd sees each edit once."""
    R, W, b = t["rotate"], t.get("weight"), t.get("bias", 0.0)
    f = {"identity": lambda v: v, "gelu": F.gelu, "relu": F.relu}[activation]
    B, P = positions.shape
    keep = dropout_mask(B * P, t["h"].shape[-1], dropout_p, seed) if dropout_p else None
    rows = [list(sequence.unbind(0)) for sequence in t["h"].unbind(0)]
    for i in range(B):
        done = set()
        for j in range(P):
            p = int(positions[i, j])
            if p < 0 or p in done:
                continue
            done.add(p)
            h = rows[i][p]
            z = {
                "loreft": lambda h: f(W @ h + b) - R @ h,
                "noreft": lambda h: f(W @ h + b) - R @ h,
                "direft": lambda h: f(W @ h + b),
                "nodireft": lambda h: f(W @ h + b),
                "consreft": lambda h: b - R @ h,
                "lobireft": lambda h: b,
            }[variant](h)
            y = h + R.t() @ z
            rows[i][p] = y if keep is None else torch.where(keep[i * P + j], y / (1 - dropout_p), 0.0)
    return torch.stack([torch.stack(sequence) for sequence in rows])


def of(t, call):
    """What ``call`` gives, and the gradients of all in ``t`` of a loss of it."""
    y = call(t)
    return y, torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), tuple(t.values()))


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4, "seed": 9}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_formulas(variant, options):
    for activation in ("identity", "gelu", "relu") if VARIANTS[variant].source else ("identity",):
        for positions in (POSITIONS, POSITIONS[:, :1], POSITIONS[:, 1:2], DISTINCT):
            t = operands(variant)
            named = {"variant": variant, "activation": activation} | options
            expected = of(t, lambda t, named=named, at=positions: row_by_row(t, at, **named))
            got = of(t, lambda t, named=named, at=positions: reft(**t, positions=at, training=True, **named))
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    for activation in ("identity", "silu") if VARIANTS[variant].source else ("identity",):
        options = dict(positions=POSITIONS, variant=variant, activation=activation)
        for more in ({}, {"dropout_p": 0.3, "training": True, "seed": 1}):
            t = operands(variant)
            call = lambda *v, t=t, o=options | more: reft(**dict(zip(t, v)), **o)  # noqa: E731
            assert torch.autograd.gradcheck(call, tuple(t.values()))


def test_no_bias_and_one_sequence():
    t = operands("loreft")
    t.pop("bias")
    expected = of(t, lambda t: row_by_row(t, POSITIONS, "loreft"))
    torch.testing.assert_close(of(t, lambda t: reft(**t, positions=POSITIONS)), expected)
    one = {n: (v[2] if n == "h" else v).detach() for n, v in t.items()}
    torch.testing.assert_close(reft(**one, positions=POSITIONS[2]), expected[0][2])


@pytest.mark.parametrize("shape, P", [((0, 4, 7), 2), ((2, 0, 7), 3), ((2, 4, 7), 0), ((1, 1, 1), 1), ((2, 3, 0), 1)])
def test_empty_and_small_shapes(shape, P):
    positions = torch.full((shape[0], P), -1 if shape[1] == 0 else shape[1] - 1)
    for variant in VARIANTS:
        t = operands(variant, shape=shape, r=3)
        y, grads = of(t, lambda t, v=variant: reft(**t, positions=positions, variant=v))
        if t["h"].numel() and P:
            expected = of(t, lambda t, v=variant: row_by_row(t, positions, v))
            torch.testing.assert_close((y, grads), expected)
        else:
            assert torch.equal(y, t["h"]) and all(not g.any() for g in grads[1:] if P == 0 or not y.numel())


def test_a_rank_beyond_the_width_and_rank_zero():
    for r in (0, 9):
        t = operands("noreft", r=r)
        expected = of(t, lambda t: row_by_row(t, POSITIONS, "noreft"))
        torch.testing.assert_close(of(t, lambda t: reft(**t, positions=POSITIONS, variant="noreft")), expected)


def test_rows_that_are_not_listed_pass_bit_by_bit():
    t = operands("loreft", BF16, (3, 50, 16))
    y = reft(**t, positions=POSITIONS)
    listed = torch.zeros(3, 50, dtype=torch.bool)
    for i, row in enumerate(POSITIONS.tolist()):
        listed[i, [p for p in row if p >= 0]] = True
    assert torch.equal(y[~listed], t["h"][~listed]) and (y[listed] != t["h"][listed]).any(-1).all()
    dy = torch.randn_like(y)
    (dh,) = torch.autograd.grad(y, t["h"], dy)
    assert torch.equal(dh[~listed], dy[~listed])


def test_what_is_listed_twice_has_equal_bits_wherever_it_stands():
    t = {n: v.detach() for n, v in operands("loreft", F32, (1, 9, 40), 5).items()}
    for positions in ([[3, 7, 3, -1]], [[3, 7]], [[-1, 7, 3, 3]]):
        options = dict(dropout_p=0.5, training=True, seed=4) if len(positions[0]) == 2 else {}
        y = reft(**t, positions=torch.tensor(positions), **options)
        assert torch.equal(y, reft(**t, positions=torch.tensor(positions), **options))
    plain = reft(**t, positions=torch.tensor([[3, 7]]))
    torch.testing.assert_close(reft(**t, positions=torch.tensor([[7, 3, -1, 7, 3]])), plain)


def test_positions_that_change_in_place_are_read_again():
    t = operands("loreft")
    positions = POSITIONS.clone()
    first = reft(**t, positions=positions)
    positions.copy_(POSITIONS.flip(0))
    second = reft(**t, positions=positions)
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, row_by_row(t, POSITIONS.flip(0), "loreft"))
    wider = {n: v.detach() for n, v in t.items()} | {"h": torch.randn(3, 8, 7, dtype=F64)}
    torch.testing.assert_close(reft(**wider, positions=positions), row_by_row(wider, positions, "loreft"))


def test_positions_that_the_host_writes_are_read_again():
    """Through numpy and ``data``, which no version counts."""
    t = operands("loreft")
    for write in (lambda p, v: p.numpy().__setitem__(slice(None), v), lambda p, v: p.data.copy_(v)):
        positions = POSITIONS.clone()
        reft(**t, positions=positions)
        write(positions, POSITIONS.flip(0))
        torch.testing.assert_close(reft(**t, positions=positions), row_by_row(t, POSITIONS.flip(0), "loreft"))
        write(positions, POSITIONS + 9)
        with pytest.raises(ValueError, match="positions are from 8"):
            reft(**t, positions=positions)


@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_listed_may_be_anything(activation, bad):
    """Rows of h and of dy that are not finite reach no gradient of a parameter, nor that of another row."""
    listed = torch.zeros(3, 5, dtype=torch.bool)
    for i, row in enumerate(POSITIONS.tolist()):
        listed[i, [p for p in row if p >= 0]] = True
    t, dy = operands("loreft"), torch.randn(3, 5, 7, dtype=F64)
    poisoned = t | {"h": t["h"].detach().masked_fill(~listed[..., None], bad).requires_grad_()}
    dys = dy, dy.masked_fill(~listed[..., None], bad)
    found = []
    for leaves, each in zip((t, poisoned), dys):
        y = reft(**leaves, positions=POSITIONS, activation=activation)
        dh, *grads = torch.autograd.grad(y, tuple(leaves.values()), each)
        found.append((y[listed], dh[listed], *grads))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_any_layout():
    t = operands("loreft")
    expected = of(t, lambda t: row_by_row(t, POSITIONS, "loreft"))
    for change in (
        lambda h: h.transpose(0, 1).contiguous().transpose(0, 1),
        lambda h: h.repeat_interleave(2, 2)[..., ::2],
    ):
        got = of(
            t, lambda t, c=change: reft(c(t["h"]), *[t[n] for n in NAMES[1:]], positions=POSITIONS.t().contiguous().t())
        )
        torch.testing.assert_close(got, expected)
    y = reft(**t, positions=POSITIONS)
    dh = torch.autograd.grad(y.sum(), t["h"])[0]  # an expanded dy
    torch.testing.assert_close(dh, torch.autograd.grad(row_by_row(t, POSITIONS, "loreft").sum(), t["h"])[0])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    for parameters in (F32, dtype, BF16):
        t = operands("loreft", dtype, (3, 5, 32), 4, parameters)
        exact = row_by_row({n: v.double() for n, v in t.items()}, POSITIONS, "loreft")
        y = reft(**t, positions=POSITIONS)
        ulp = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(exact.abs()))
        assert y.dtype == dtype and ((y.double() - exact).abs() <= 0.5 * ulp + 1e-5).all()
        grads = torch.autograd.grad(y, tuple(t.values()), torch.ones_like(y))
        assert [g.dtype for g in grads] == [v.dtype for v in t.values()]


@dataclasses.dataclass(frozen=True)
class Edits:
    """A problem for the accuracy check; eager is pyreft's order of operations, with the rows in the parameters' dtype."""

    seed: int
    dtype: torch.dtype
    parameters: torch.dtype
    variant: str
    frozen: frozenset = frozenset()

    def tensors(self):
        torch.manual_seed(self.seed)
        t = operands(self.variant, self.dtype, (3, 5, 65), 7, self.parameters)
        # The check takes "weight" for a frozen base.
        t = {n.replace("weight", "source"): v.detach() for n, v in t.items()}
        return t | {"dy": torch.randn(3, 5, 65).to(self.dtype)}

    def ours(self, t):
        return reft(t["h"], t["rotate"], t.get("source"), t["bias"], positions=DISTINCT, variant=self.variant)

    def eager(self, t):
        return self.oracle(t)

    def oracle(self, t, absolute=False):
        rows = DISTINCT[..., None].expand(3, 2, 65)
        x = t["h"].gather(1, rows).to(t["rotate"].dtype)
        z = F.linear(x, t["source"], t["bias"]) if "source" in t else t["bias"].expand(3, 2, 7)
        if VARIANTS[self.variant].subtracts:
            projected = F.linear(x, t["rotate"])
            z = z + projected if absolute else z - projected
        return t["h"].scatter(1, rows, (x + z @ t["rotate"]).to(t["h"].dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_accuracy(variant):
    """No error above 1.5 times eager's, of y and every gradient."""
    for dtype, parameters in ((F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)):
        problem = Edits(3, dtype, parameters, variant)
        bad = [row for row in check(problem) if not row.ok]
        assert not bad, f"{problem}\n{bad}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_saves_the_listed_rows_alone(variant):
    t = operands(variant, F32, (3, 5, 16))
    big = {n: v for n, v in t.items() if n != "h"} | {"h": torch.randn(3, 100, 16)}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        reft(**big, positions=POSITIONS, variant=variant, dropout_p=0.1, training=True)
    own = {v.data_ptr() for v in t.values()}
    B, P, H, r = 3, 4, 16, 2
    rows, small = B * P * H * 4, B * P * r * 4
    reads = VARIANTS[variant].source or VARIANTS[variant].subtracts
    assert sum(v.nbytes for v in kept if v.data_ptr() not in own) <= rows * reads + small + 8
    assert all(v.untyped_storage().nbytes() <= rows for v in kept)


@pytest.mark.parametrize(
    "variant, trains", [(v, n) for v in VARIANTS for n in NAMES if n != "weight" or VARIANTS[v].source]
)
def test_what_trains_gets_its_gradient_alone(variant, trains):
    t = operands(variant)
    named = {"activation": "gelu"} if VARIANTS[variant].source else {}
    call = lambda t: reft(**t, positions=POSITIONS, variant=variant, **named)  # noqa: E731
    (expected,) = torch.autograd.grad(call(t).square().sum(), t[trains])
    frozen = {n: v if n == trains else v.detach() for n, v in t.items()}
    torch.testing.assert_close(torch.autograd.grad(call(frozen).square().sum(), t[trains])[0], expected)
    assert not call({n: v.detach() for n, v in t.items()}).requires_grad


def test_h_and_the_output_may_change_in_place():
    t = operands("loreft")
    expected = torch.autograd.grad((2 * reft(**t, positions=POSITIONS)).sum(), tuple(t.values()))
    h = t["h"] * 1
    y = reft(**(t | {"h": h}), positions=POSITIONS)
    h.zero_()
    y.mul_(2.0)
    (dh,) = torch.autograd.grad(y.sum(), t["rotate"])
    torch.testing.assert_close(dh, expected[1])


@pytest.mark.parametrize("half", [BF16, F16], ids=str)
def test_autocast_changes_nothing(half):
    t = operands("loreft", F32)
    plain = of(t, lambda t: reft(**t, positions=POSITIONS))
    with torch.autocast("cpu", half):
        cast = of(t, lambda t: reft(**t, positions=POSITIONS))
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def test_compiled():
    for variant in ("loreft", "lobireft"):
        t = operands(variant, F32)

        def step(t, variant=variant):
            options = dict(dropout_p=0.3, training=True, seed=torch.tensor([3]))
            return reft(**t, positions=POSITIONS, variant=variant, **options)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(of(t, compiled), of(t, step))


def test_checkpointing_draws_the_same_bits():
    t = operands("loreft")
    layer = lambda *v: reft(*v, positions=POSITIONS, dropout_p=0.5, training=True)  # noqa: E731
    grads = []
    for run in (layer, lambda *v: checkpoint(layer, *v, use_reentrant=False)):
        torch.manual_seed(2)
        grads.append(torch.autograd.grad(run(*t.values()).square().sum(), tuple(t.values())))
    torch.testing.assert_close(*grads)


def test_second_derivatives_and_transforms_are_refused():
    t = operands("loreft")
    with pytest.raises(RuntimeError, match="reft has no second derivative"):
        torch.autograd.grad(reft(**t, positions=POSITIONS).square().sum(), t["h"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"reft does not support torch\.func"):
        torch.func.grad(lambda h: reft(h, t["rotate"].detach(), t["weight"].detach(), positions=POSITIONS).sum())(
            t["h"].detach()
        )


def test_inference_mode_then_training():
    t = operands("loreft")
    with torch.inference_mode():
        h, positions = t["h"] * 1, POSITIONS.clone()
        assert reft(h, *[t[n] for n in NAMES[1:]], positions=POSITIONS).is_inference()
    for at in (POSITIONS, positions):
        (dR,) = torch.autograd.grad(reft(h, *[t[n] for n in NAMES[1:]], positions=at).sum(), t["rotate"])
        assert dR.any()


H, R, B = torch.randn(3, 5, 7), torch.randn(2, 7), torch.randn(2)
BAD = {
    "h is 1-D": (dict(h=H[0, 0]), ValueError, "h has shape"),
    "h is integer": (dict(h=H.long()), TypeError, "h has dtype"),
    "rotate is transposed": (dict(rotate=R.t()), ValueError, r"rotate has shape \(7, 2\), expected \(r, H\)"),
    "rotate is fp64": (dict(rotate=R.double()), TypeError, "rotate has dtype"),
    "no weight": (dict(weight=None), TypeError, "weight must be a tensor"),
    "weight has another rank": (dict(weight=torch.randn(3, 7)), ValueError, "weight has shape"),
    "a weight for consreft": (dict(variant="consreft"), ValueError, "weight is given, but consreft has none"),
    "no bias for lobireft": (dict(variant="lobireft", weight=None, bias=None), TypeError, "bias must be a tensor"),
    "bias is long": (dict(bias=torch.randn(3)), ValueError, "bias has shape"),
    "variant is unknown": (dict(variant="reft"), ValueError, "variant is 'reft'"),
    "variant is a list": (dict(variant=["loreft"]), ValueError, "variant is"),
    "activation is unknown": (dict(activation="glu"), ValueError, "activation is 'glu'"),
    "activation without a source": (
        dict(variant="consreft", weight=None, activation="gelu"), ValueError, "consreft has no source",
    ),
    "positions are a list": (dict(positions=[0]), TypeError, "positions must be a tensor"),
    "positions are int32": (dict(positions=POSITIONS.int()), TypeError, "positions has dtype"),
    "positions of another batch": (dict(positions=POSITIONS[1:]), ValueError, "positions has shape"),
    "positions of one sequence": (dict(positions=POSITIONS[0]), ValueError, "positions has shape"),
    "a position beyond T": (dict(positions=POSITIONS + 1), ValueError, "positions are from 0 to 5, expected -1"),
    "a position below -1": (dict(positions=POSITIONS - 1), ValueError, "positions are from -2 to 3, expected -1"),
    "dropout_p is 1": (dict(dropout_p=1.0), ValueError, "dropout_p must be in"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, match = BAD[case]
    with pytest.raises(error, match=match):
        reft(**(dict(h=H, rotate=R, weight=R, bias=B, positions=POSITIONS) | change))

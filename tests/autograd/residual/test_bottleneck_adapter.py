"""bottleneck_adapter under autograd: every gradient, what is saved, dtypes, autocast, a compiler, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftkern import bottleneck_adapter
from peftkern.activations import ACTIVATIONS
from peftkern.autograd import saved as reading
from peftkern.backends.cpu import call
from peftkern.dispatch.registry import takers

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = ("h", "down", "up", "down_bias", "up_bias", "gate", "out_scale", "scaling", "residual")


def operands(dtype=F64, lead=(2, 3), K=6, N=6, R=4, matrices=None, vectors=None) -> dict[str, torch.Tensor]:
    """Leaves of every argument that is differentiable."""
    shapes = {
        "h": (*lead, K), "down": (R, K), "up": (N, R), "down_bias": (R,), "up_bias": (N,), "gate": (lead[0], 1, 1),
        "out_scale": (N,), "scaling": (1,), "residual": (*lead, N),
    }  # fmt: skip
    dtypes = {"h": dtype, "residual": dtype} | dict.fromkeys(("down", "up"), matrices or dtype)
    made = {n: torch.randn(*shape, dtype=F64) for n, shape in shapes.items()}
    return {n: v.to(dtypes.get(n, vectors or dtype)).requires_grad_() for n, v in made.items()}


def only(t, *names):
    """h, the matrices and these, those that are not named being frozen or left out."""
    return {n: t[n] if n in names else t[n].detach() for n in ("h", "down", "up", *names)}


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4}, {"dropout_p": 0.4, "dropout_on": "input"}], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, options):
    options = options | {"activation": activation, "training": True, "seed": 5}
    for names in (NAMES[:3], NAMES[:5], NAMES):
        t = operands(lead=(2, 2), K=4, N=3 if "residual" in names else 4, R=3)
        call = lambda *v, names=names: bottleneck_adapter(**dict(zip(names, v)), **options)  # noqa: E731
        assert torch.autograd.gradcheck(call, tuple(t[n] for n in names))


def test_forms_of_the_arguments():
    t = {n: v.detach() for n, v in operands(F32).items()}
    base = {n: t[n] for n in ("h", "down", "up")}
    plain = bottleneck_adapter(**base, scaling=0.5)
    for other in (
        bottleneck_adapter(**base, scaling=torch.tensor(0.5)),
        bottleneck_adapter(**base, residual=t["h"], scaling=0.5),
        bottleneck_adapter(**base, residual=t["h"].clone(), scaling=0.5),
        bottleneck_adapter(**base, out_scale=torch.full((6,), 0.5)),
        bottleneck_adapter(**base, gate=torch.full((1,), 0.5)),
        bottleneck_adapter(**base, gate=torch.full((2, 3, 1), 0.5)),
        bottleneck_adapter(t["h"].reshape(6, 6), t["down"], t["up"], scaling=0.5).view(2, 3, 6),
    ):
        torch.testing.assert_close(other, plain)
    assert torch.equal(bottleneck_adapter(**base, dropout_p=0.9), bottleneck_adapter(**base))
    one = bottleneck_adapter(t["h"][0, 0], t["down"], t["up"], scaling=0.5)
    torch.testing.assert_close(one, plain[0, 0])


@pytest.mark.parametrize("lead, K, R", [((0, 3), 6, 4), ((2, 0), 6, 4), ((2, 3), 1, 1), ((2, 3), 7, 1), ((1, 1), 5, 9)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_empty_and_small_shapes(dtype, lead, K, R):
    """No rows, one rank, odd sizes, no biases: values and gradients of torch's steps in fp64."""
    t = operands(dtype, lead, K, K, R, F32)
    t = {n: t[n] for n in ("h", "down", "up")}
    y = bottleneck_adapter(**t, activation="silu")
    exact = {n: v.detach().double().requires_grad_() for n, v in t.items()}
    h, down, up = exact.values()
    expected = h + nn.functional.silu(h @ down.t()) @ up.t()
    found = torch.autograd.grad(y, tuple(t.values()), torch.ones_like(y))
    grads = torch.autograd.grad(expected, tuple(exact.values()), torch.ones_like(expected))
    assert y.shape == (*lead, K)
    torch.testing.assert_close([y, *found], [v.to(f.dtype) for v, f in zip((expected, *grads), (y, *found))])


def test_dropout_draws_from_the_seed_or_from_torch():
    t = only({n: v.detach() for n, v in operands(F32, (2, 40)).items()})
    call = lambda **o: bottleneck_adapter(**t, dropout_p=0.5, training=True, **o)  # noqa: E731
    assert torch.equal(call(seed=3), call(seed=torch.tensor([3]))) and not torch.equal(call(seed=3), call(seed=4))
    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    assert torch.equal(first, call()) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_gradients_have_their_inputs_dtypes(dtype):
    for matrices in (F32, dtype):
        for vectors in (F32, dtype):
            t = operands(dtype, matrices=matrices, vectors=vectors)
            y = bottleneck_adapter(**t, activation="gelu")
            assert y.dtype == dtype
            for v, grad in zip(t.values(), torch.autograd.grad(y, tuple(t.values()), torch.ones_like(y))):
                assert (grad.dtype, grad.shape) == (v.dtype, v.shape)


def test_a_residual_of_another_dtype_is_promoted():
    t = operands(BF16, matrices=F32, vectors=F32)
    residual = t["residual"].detach().float().requires_grad_()
    y = bottleneck_adapter(t["h"], t["down"], t["up"], residual=residual)
    plain = bottleneck_adapter(t["h"].detach().float(), t["down"], t["up"], residual=residual)
    assert y.dtype == F32 and torch.equal(y, plain)
    dh, dresidual = torch.autograd.grad(y, (t["h"], residual), torch.ones_like(y))
    assert dh.dtype == BF16 and torch.equal(dresidual, torch.ones_like(residual))


@pytest.mark.parametrize("half", [BF16, F16], ids=str)
def test_parameters_of_h_beside_a_wider_residual(half):
    t = operands(half)
    t["residual"] = t["residual"].detach().float().requires_grad_()
    t["gate"] = t["gate"].detach().expand(2, 3, 1).clone().requires_grad_()  # so that torch sums no rounded gradients
    wide = {n: v.detach().float().requires_grad_() for n, v in t.items()}
    found = []
    for leaves in (t, wide):
        y = bottleneck_adapter(**leaves, activation="gelu")
        found.append((y, [g.float() for g in torch.autograd.grad(y, tuple(leaves.values()), torch.ones_like(y))]))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close([g.to(half) for g in found[0][1]], [g.to(half) for g in found[1][1]])


@pytest.mark.parametrize("trains", NAMES)
def test_what_trains_gets_its_gradient_alone(trains):
    t = operands(F64)
    whole = bottleneck_adapter(**t, activation="silu", dropout_p=0.3, training=True, seed=1)
    (expected,) = torch.autograd.grad(whole.square().sum(), t[trains])
    frozen = {n: v if n == trains else v.detach() for n, v in t.items()}
    y = bottleneck_adapter(**frozen, activation="silu", dropout_p=0.3, training=True, seed=1)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), t[trains])[0], expected)
    assert not bottleneck_adapter(**{n: v.detach() for n, v in t.items()}).requires_grad


def kept_by(call) -> list[torch.Tensor]:
    """What a call saves for backward."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_saves_h_and_four_bytes_for_each_number_of_t(dtype):
    M, K, R = 64, 32, 5
    t = operands(dtype, (4, 16), K, K, R, F32, F32)
    h = t["h"] * 1
    given = {n: t[n] for n in ("down", "up", "down_bias", "up_bias")}
    kept = kept_by(lambda: bottleneck_adapter(h, **given, activation="gelu", dropout_p=0.1, training=True))
    own = {v.data_ptr() for v in (h, *given.values())}
    assert h.data_ptr() in {v.data_ptr() for v in kept}
    extra = sum(v.nbytes for v in kept if v.data_ptr() not in own)
    assert extra == 4 * M * R + 8  # and the seed
    # The order of torch ops in which the library states it keeps this much:
    stock = kept_by(
        lambda: h + nn.functional.dropout(nn.functional.gelu(h @ t["down"].to(dtype).t()) @ t["up"].to(dtype).t(), 0.1)
    )
    assert extra < sum(v.nbytes for v in stock if v.data_ptr() not in own)


@pytest.mark.parametrize(
    "trains, reads",
    [
        ("h", {"t", "down", "up", "gate", "out_scale"}),
        ("down", {"h", "t", "up", "gate", "out_scale"}),
        ("up", {"t", "gate", "out_scale"}),
        ("down_bias", {"t", "up", "gate", "out_scale"}),
        ("up_bias", {"gate", "out_scale"}),
        ("gate", {"t", "up", "up_bias", "out_scale"}),
        ("out_scale", {"t", "up", "up_bias", "gate"}),
        ("residual", set()),
    ],
)
def test_saves_what_its_gradients_read(trains, reads):
    t = operands(F32, K=7)
    t = {n: v.detach() for n, v in t.items() if n != "scaling"} | {"gate": torch.randn(2, 3, 1)}
    t[trains] = t[trains].requires_grad_() * 1
    kept = kept_by(lambda: bottleneck_adapter(**t, activation="gelu"))
    names = {v.data_ptr(): n for n, v in t.items()}
    assert {names.get(v.data_ptr(), "t") for v in kept} == reads
    assert all(v.data_ptr() in names or v.shape == (6, 4) for v in kept)


def test_a_small_part_of_a_large_tensor_is_kept_as_a_copy():
    t = operands(F32)
    large = torch.randn(2, 3000, 6)
    kept = kept_by(lambda: bottleneck_adapter(large[:, :3], t["down"], t["up"]))
    assert all(v.untyped_storage().nbytes() <= 2 * 6 * 6 * 4 for v in kept)


needs_one_by_one = pytest.mark.skipif(
    not reading.READS_ONE_BY_ONE, reason="this torch cannot say which saved tensor has changed"
)


@needs_one_by_one
def test_an_input_that_changed_is_named(monkeypatch):
    t = operands(F32)

    def run():
        h = t["h"] * 1
        y = bottleneck_adapter(h, t["down"], t["up"])
        h.add_(1.0)
        return torch.autograd.grad(y.sum(), t["down"])[0]

    with pytest.raises(RuntimeError, match=r"bottleneck_adapter: h was changed in place.*Change a copy"):
        run()
    monkeypatch.setenv("PEFTKERN_SAVE_INPUT", "copy")
    expected = torch.autograd.grad(bottleneck_adapter(t["h"], t["down"], t["up"]).sum(), t["down"])[0]
    assert torch.equal(run(), expected)


@needs_one_by_one
def test_a_changed_parameter_is_named_with_its_layer_not_that_of_the_residual():
    model = nn.ModuleDict({"a_layer_with_a_long_name": nn.Linear(6, 6), "adapter": nn.Linear(6, 4, bias=False)})
    h, up = torch.randn(3, 6, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    down = model["adapter"].weight
    y = bottleneck_adapter(h, down, up, residual=model["a_layer_with_a_long_name"](h))
    with torch.no_grad():
        down.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"down was changed in place .*layer that has 'adapter\.weight'"):
        y.sum().backward()


def test_h_may_change_in_place_where_no_gradient_reads_it():
    t = operands(F32)
    h = t["h"].detach() * 1
    y = bottleneck_adapter(h, t["down"].detach(), t["up"])
    h.zero_()
    y.sum().backward()
    assert t["up"].grad.any()


def test_the_output_may_change_in_place():
    t = operands(F32)
    y = bottleneck_adapter(t["h"], t["down"], t["up"])
    expected = torch.autograd.grad((y * 2).sum(), t["up"], retain_graph=True)[0]
    y.mul_(2.0)
    assert torch.equal(torch.autograd.grad(y.sum(), t["up"])[0], expected)


@pytest.mark.parametrize("half", [BF16, F16], ids=str)
def test_autocast(half):
    """Inputs keep their dtype; matrices of another half precision follow them."""
    t = {n: v.detach() for n, v in operands(F32).items()}
    plain = bottleneck_adapter(**t)
    with torch.autocast("cpu", half):
        assert torch.equal(bottleneck_adapter(**t), plain)
        low = bottleneck_adapter(t["h"].to(half), t["down"], t["up"])
        other = BF16 if half == F16 else F16
        mixed = bottleneck_adapter(t["h"].to(half), t["down"].to(other), t["up"].to(other))
        scaled = dict(scaling=t["scaling"], out_scale=t["out_scale"].to(other))
        scaled = bottleneck_adapter(t["h"].to(half), t["down"], t["up"], **scaled)
    assert torch.equal(low, bottleneck_adapter(t["h"].to(half), t["down"], t["up"]))
    assert mixed.dtype == scaled.dtype == half
    leaf = operands(F32)
    with torch.autocast("cpu", half):
        y = bottleneck_adapter(leaf["h"], leaf["down"], leaf["up"])
    assert all(g.dtype == F32 for g in torch.autograd.grad(y.sum(), (leaf["h"], leaf["down"], leaf["up"])))


def test_compiled():
    t = operands(F32)
    h = {n: v for n, v in t.items() if n != "scaling"}

    def step(h):
        return bottleneck_adapter(**h, activation="gelu", dropout_p=0.3, training=True, seed=torch.tensor([3]))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = tuple(h.values())
    torch.testing.assert_close(compiled(h), step(h))
    grads = [torch.autograd.grad(f(h).square().sum(), leaves) for f in (step, compiled)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_bits(reentrant):
    t = operands(F32, (4, 20))
    leaves = tuple(t[n] for n in ("h", "down", "up"))

    def layer(h, down, up):
        return bottleneck_adapter(h, down, up, activation="gelu", dropout_p=0.5, training=True)

    grads = []
    for run in (layer, lambda *v: checkpoint(layer, *v, use_reentrant=reentrant)):
        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(2)
        run(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*grads)


def test_second_derivatives_and_transforms_are_refused():
    t = operands(F32)
    with pytest.raises(RuntimeError, match="bottleneck_adapter has no second derivative"):
        torch.autograd.grad(bottleneck_adapter(**t).square().sum(), t["h"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"bottleneck_adapter does not support torch\.func"):
        torch.func.grad(lambda h: bottleneck_adapter(h, t["down"].detach(), t["up"].detach()).sum())(t["h"].detach())


def test_inference_mode_then_training():
    t = operands(F32)
    with torch.inference_mode():
        h = t["h"] * 1
        y = bottleneck_adapter(h, t["down"], t["up"])
    assert y.is_inference()
    bottleneck_adapter(h, t["down"], t["up"]).sum().backward()
    assert t["down"].grad is not None


H, DOWN, UP, ONE = torch.randn(2, 3, 6), torch.randn(4, 6), torch.randn(6, 4), torch.ones(1)
BAD = {
    "h is a list": (dict(h=[1.0]), TypeError, "h must be a tensor, got list"),
    "h has no dimension": (dict(h=torch.tensor(1.0)), ValueError, r"shape \(\)"),
    "up is None": (dict(up=None), TypeError, "up must be a tensor"),
    "up has another width": (dict(up=torch.randn(7, 4)), ValueError, "up has shape"),
    "down is a list": (dict(down=DOWN.tolist()), TypeError, "down must be a tensor, got list"),
    "up has no dimension": (dict(up=torch.tensor(1.0), scaling=ONE), ValueError, r"up has shape \(\)"),
    "up_bias is a number": (dict(up_bias=1.0), TypeError, "up_bias must be a tensor, got float"),
    "out_scale is a list": (dict(out_scale=[1.0], scaling=ONE), TypeError, "out_scale must be a tensor, got list"),
    "out_scale is one number": (dict(out_scale=ONE, scaling=ONE), ValueError, "out_scale has shape"),
    "out_scale is integer": (dict(out_scale=torch.ones(6).int(), scaling=ONE), TypeError, "out_scale has dtype int32"),
    "out_scale is elsewhere": (
        dict(out_scale=torch.ones(6, device="meta"), scaling=ONE),
        ValueError,
        "out_scale is on",
    ),
    "residual has other rows": (dict(residual=torch.randn(3, 2, 6)), ValueError, "residual has shape"),
    "residual has no dimension": (dict(residual=torch.tensor(1.0)), ValueError, "residual has shape"),
    "gate has another batch": (dict(gate=torch.randn(4, 1, 1)), ValueError, r"gate has shape \(4, 1, 1\).*\(2, 3, 1\)"),
    "gate has columns": (dict(gate=torch.randn(2, 3, 6)), ValueError, "gate has shape"),
    "scaling has two elements": (dict(scaling=torch.ones(2)), ValueError, "scaling must have one element"),
    "scaling is integer": (dict(scaling=torch.tensor(1)), TypeError, "scaling must be a float"),
    "scaling is text": (dict(scaling="learned"), TypeError, "scaling must be a float"),
    "dropout_on is unknown": (dict(dropout_on="both"), ValueError, "dropout_on is 'both'"),
    "dropout_p is 1": (dict(dropout_p=1.0), ValueError, "dropout_p must be in"),
    "activation is unknown": (dict(activation="glu"), ValueError, "activation is 'glu'"),
    "seed is a float": (dict(dropout_p=0.5, training=True, seed=1.0), TypeError, "seed must be an int"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, match = BAD[case]
    with pytest.raises(error, match=match):
        bottleneck_adapter(**(dict(h=H, down=DOWN, up=UP) | change))


@pytest.mark.skipif(call.unavailable is not None, reason=f"no native calls: {call.unavailable}")
def test_a_known_call_is_one_native_call(monkeypatch):
    """The second call like it does not go by the op, forward or backward, unless settings name another back end."""

    def step():
        h = torch.randn(3, 5, 8, requires_grad=True)
        y = bottleneck_adapter(
            h, torch.ones(2, 8), torch.ones(8, 2), residual=torch.ones(3, 5, 8), dropout_p=0.5, training=True
        )
        return torch.autograd.grad(y.sum(), h)

    def ops():
        return {key[0] for key in takers if key[0].startswith("bottleneck_adapter")}

    step()
    takers.clear()
    step()
    assert not ops()
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")
    step()
    assert ops() == {"bottleneck_adapter_fwd", "bottleneck_adapter_bwd"}

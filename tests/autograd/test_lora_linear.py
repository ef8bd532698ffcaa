"""lora_linear as a differentiable function: gradients, what is saved, compile, autocast, checkpointing, seeds."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peftkern import dropout_mask, lora_linear
from peftkern.testing.equations import oracle

M, K, N, R = 12, 34, 21, 5
SIZES = dict(bias=N, rank_scale=R, base_in_scale=K, delta_in_scale=K, base_out_scale=N, delta_out_scale=N)


def leaves(dtype=torch.float32, adapter_dtype=None, grad=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*s, dtype=dtype):
        return torch.randn(*s, generator=g).to(dtype).requires_grad_(grad)

    a = adapter_dtype or dtype
    return dict(
        x=normal(M, K), weight=normal(N, K).detach(), lora_A=normal(R, K, dtype=a), lora_B=normal(N, R, dtype=a),
        **{name: normal(size) for name, size in SIZES.items()},
    )  # fmt: skip


def call(t, **options):
    t = dict(t)
    return lora_linear(*[t.pop(k) for k in ("x", "weight", "lora_A", "lora_B")], **t, **options)


def pick(t, *names):
    return {k: t[k] for k in ("x", "weight", "lora_A", "lora_B", *names)}


def saved_storages(function):
    """{storage pointer: bytes} of what a call packs for backward."""
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    return found, y


def test_gradcheck_in_fp64():
    t = leaves(torch.float64)
    scaling = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    names = [k for k in t if k != "weight"]

    def function(s, *values):
        return call(dict(t, **dict(zip(names, values, strict=True))), scaling=s, dropout_p=0.3, training=True, seed=5)

    assert torch.autograd.gradcheck(function, (scaling, *(t[k] for k in names)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_through_gradients(p):
    t = leaves()
    y = call(t, scaling=1.7, dropout_p=p, training=True, seed=11)
    names = [k for k in t if k != "weight"]
    dy = torch.randn(M, N)
    ours = torch.autograd.grad(y, [t[k] for k in names], dy)
    exact = {k: v.detach().double().requires_grad_(k != "weight") for k, v in t.items()}
    z = oracle(exact, 1.7, dropout_mask(M, K, p, 11), p)
    theirs = torch.autograd.grad(z, [exact[k] for k in names], dy.double())
    torch.testing.assert_close(y.double(), z, atol=1e-4, rtol=1e-4)
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_every_subset_of_frozen_inputs():
    # Each input frozen in turn, and each alone trainable: the others' gradients do not change.
    t = leaves()
    names = [k for k in t if k != "weight"]
    dy = torch.randn(M, N)
    options = dict(scaling=0.5, dropout_p=0.3, training=True, seed=3)
    full = dict(zip(names, torch.autograd.grad(call(t, **options), [t[k] for k in names], dy), strict=True))
    for chosen in [[k for k in names if k != frozen] for frozen in names] + [[k] for k in names]:
        part = {k: v.detach().requires_grad_(k in chosen) for k, v in t.items()}
        grads = torch.autograd.grad(call(part, **options), [part[k] for k in chosen], dy)
        for name, grad in zip(chosen, grads, strict=True):
            torch.testing.assert_close(grad, full[name], atol=1e-5, rtol=1e-5)


def test_not_training_means_no_dropout_and_no_seed():
    t = pick(leaves(), "bias")
    state = torch.get_rng_state()
    y = call(t, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y, call(t))
    call(t, dropout_p=0.5, training=True)
    assert not torch.equal(torch.get_rng_state(), state)


def test_manual_seed_reproduces_and_seed_tensor_is_read_late():
    t = pick(leaves())
    outs = []
    for _ in range(2):
        torch.manual_seed(1)
        outs.append(call(t, dropout_p=0.5, training=True))
    assert torch.equal(*outs)
    seed = torch.tensor([5])
    a = call(t, dropout_p=0.5, training=True, seed=seed)
    assert torch.equal(a, call(t, dropout_p=0.5, training=True, seed=5))
    seed.fill_(6)
    assert torch.equal(call(t, dropout_p=0.5, training=True, seed=seed), call(t, dropout_p=0.5, training=True, seed=6))


@pytest.mark.parametrize("shape", [(), (1,), (2, 6), (3, 2, 2), (0,), (2, 0, 3)])
def test_leading_shapes(shape):
    t = leaves(grad=False)
    t["x"] = torch.randn(*shape, K, requires_grad=True)
    y = call(t, scaling=2.0, dropout_p=0.2, training=True, seed=2)
    assert y.shape == (*shape, N)
    flat = dict(t, x=t["x"].reshape(-1, K))
    torch.testing.assert_close(y.reshape(-1, N), call(flat, scaling=2.0, dropout_p=0.2, training=True, seed=2))
    y.sum().backward()
    assert t["x"].grad.shape == t["x"].shape


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bytes_saved_for_backward(adapter_dtype):
    t = pick(leaves(torch.bfloat16, adapter_dtype), "bias")
    found, y = saved_storages(lambda: call(t, scaling=2.0, dropout_p=0.1, training=True))
    inputs = {v.untyped_storage().data_ptr() for v in t.values()}
    assert t["x"].untyped_storage().data_ptr() in found  # shared, not copied
    assert sum(size for pointer, size in found.items() if pointer not in inputs) <= 4 * M * R + 64
    y.sum().backward()


def test_frozen_lora_A_saves_no_x():
    t = pick(leaves(), "bias", "rank_scale", "delta_out_scale")
    t["lora_A"] = t["lora_A"].detach()
    found, y = saved_storages(lambda: call(t, dropout_p=0.1, training=True))
    assert t["x"].untyped_storage().data_ptr() not in found
    y.sum().backward()
    assert t["x"].grad is not None and t["lora_A"].grad is None


def test_layers_that_share_x_save_it_once():
    t = pick(leaves(torch.float32))
    x = t["x"].reshape(3, 4, K)

    def qkv():
        with torch.autocast("cpu", torch.bfloat16):
            return sum(lora_linear(x, t["weight"], t["lora_A"], t["lora_B"]) for _ in range(3))

    found, _ = saved_storages(qkv)
    parameters = {v.untyped_storage().data_ptr() for k, v in t.items() if k != "x"}
    extra = {p: s for p, s in found.items() if p not in parameters}
    assert sum(extra.values()) <= x.untyped_storage().nbytes() + 3 * (4 * M * R + 64)


def test_x_used_twice_and_accumulation():
    t = pick(leaves())
    (call(t) * call(t).detach() + call(t)).sum().backward()
    first = t["lora_A"].grad.clone()
    (call(t) * call(t).detach() + call(t)).sum().backward()
    torch.testing.assert_close(t["lora_A"].grad, 2 * first)


def test_expanded_and_strided_output_gradients():
    t = pick(leaves())
    dense = torch.autograd.grad(call(t), [t["x"], t["lora_A"], t["lora_B"]], torch.ones(M, N))
    expanded = torch.autograd.grad(call(t).sum(), [t["x"], t["lora_A"], t["lora_B"]])
    transposed = torch.autograd.grad(call(t).t(), [t["x"], t["lora_A"], t["lora_B"]], torch.ones(N, M))
    for a, b, c in zip(dense, expanded, transposed, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_tensor_scaling_equals_float():
    t = leaves()
    scale = torch.tensor([0.6], requires_grad=True)
    torch.testing.assert_close(call(t, scaling=scale), call(t, scaling=0.6))
    call(t, scaling=scale).sum().backward()
    eps = 1e-2
    numeric = (call(t, scaling=0.6 + eps).double().sum() - call(t, scaling=0.6 - eps).double().sum()) / (2 * eps)
    torch.testing.assert_close(scale.grad.double().sum(), numeric.detach(), rtol=1e-2, atol=1e-2)


def two_layers(t, w2):
    """(x, lora_B) -> loss of a LoRA layer with dropout and a second, plain layer, under activation checkpointing."""

    def block(x, lora_B):
        return call(dict(t, x=x, lora_B=lora_B), dropout_p=0.4, training=True).relu() @ w2.t()

    return block, lambda x, lora_B: checkpoint(block, x, lora_B, use_reentrant=False).square().sum()


def test_checkpointing_with_dropout():
    t, w2 = pick(leaves(), "bias"), torch.randn(K, N)
    plain, checkpointed = two_layers(t, w2)

    def run(loss):
        torch.manual_seed(3)
        value = loss(t["x"], t["lora_B"])
        return [value, *torch.autograd.grad(value, [v for v in t.values() if v.requires_grad])]

    for a, b in zip(run(checkpointed), run(lambda *args: plain(*args).square().sum()), strict=True):
        assert torch.equal(a, b)


def test_checkpointing_with_dropout_compiled():
    # Compiled and eager runs may draw other seeds, so the gradient is held against differences of the compiled loss.
    t, w2 = pick(leaves(), "bias"), torch.randn(K, N)
    loss = torch.compile(two_layers(t, w2)[1], fullgraph=True)

    def value(lora_B):
        torch.manual_seed(3)
        return loss(t["x"], lora_B)

    grad = torch.autograd.grad(value(t["lora_B"]), t["lora_B"])[0].double()
    direction, eps = torch.randn(N, R), 1e-2
    moved = [value((t["lora_B"] + sign * eps * direction).detach().requires_grad_()).item() for sign in (1, -1)]
    assert (grad * direction).sum().item() == pytest.approx((moved[0] - moved[1]) / (2 * eps), rel=1e-2)


@pytest.mark.parametrize(
    "options", [{}, dict(dropout_p=0.3, training=True, seed=torch.tensor([4]))], ids=["plain", "dropout"]
)
def test_fullgraph_compile(options):
    t = leaves()
    names = [k for k in t if k != "weight"]
    dy = torch.randn(M, N)
    eager = call(t, scaling=1.5, **options)
    compiled = torch.compile(lambda t: call(t, scaling=1.5, **options), fullgraph=True)(t)
    torch.testing.assert_close(compiled, eager)
    pairs = zip(
        torch.autograd.grad(compiled, [t[k] for k in names], dy),
        torch.autograd.grad(eager, [t[k] for k in names], dy),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_compile_with_a_dynamic_batch():
    t = pick(leaves())
    compiled = torch.compile(lambda x: call(dict(t, x=x)), fullgraph=True, dynamic=True)
    for rows in (3, 12, 7):
        x = torch.randn(rows, K)
        torch.testing.assert_close(compiled(x), call(dict(t, x=x)))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(weight_dtype):
    t = pick(leaves(torch.float32), "bias")
    t["weight"] = t["weight"].to(weight_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(t, scaling=2.0)
        plain = torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
    assert y.dtype == plain.dtype == torch.bfloat16
    low = {k: v.detach().bfloat16().requires_grad_(k == "x") if k in ("x", "weight") else v for k, v in t.items()}
    assert torch.equal(y, call(low, scaling=2.0))
    y.float().sum().backward()
    assert {k: v.grad.dtype for k, v in t.items() if v.requires_grad} == dict.fromkeys(
        ("x", "lora_A", "lora_B", "bias"), torch.float32
    )
    dx = t["x"].grad
    call(low, scaling=2.0).float().sum().backward()
    assert torch.equal(dx, low["x"].grad.float())


def test_autocast_leaves_fp64_alone():
    t = pick(leaves(torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert call(t).dtype == torch.float64


def test_modes_without_grad():
    t = pick(leaves(), "bias")
    want = call(t).detach()
    with torch.no_grad():
        y = call(t)
        assert torch.equal(y, want) and not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(call(t), want)
    meta = {k: v.detach().to("meta") for k, v in t.items()}
    assert call(meta).shape == (M, N)
    frozen = {k: v.detach() for k, v in t.items()}
    assert not call(frozen).requires_grad


def test_a_weight_that_requires_grad_is_fine_without_grad_mode():
    t = pick(leaves())
    t["weight"].requires_grad_()
    with torch.no_grad():
        call(t)


def test_second_derivative_and_transforms_raise():
    t = pick(leaves())
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(call(t).sum(), t["x"], create_graph=True)
    x, *rest = (v.detach() for v in t.values())
    for transform in (
        lambda: torch.func.grad(lambda x: lora_linear(x, *rest).sum())(x),
        lambda: torch.func.vmap(lambda x: lora_linear(x, *rest))(x[None]),
        lambda: torch.func.jvp(lambda x: lora_linear(x, *rest), (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.func"):
            transform()


def test_double_backward_through_a_retained_graph():
    t = pick(leaves())
    y = call(t, dropout_p=0.5, training=True).sum()
    first = torch.autograd.grad(y, t["lora_A"], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, t["lora_A"])[0])


def test_changing_x_in_place_before_backward_raises():
    t = pick(leaves())
    x = t["x"].clone()
    y = call(dict(t, x=x))
    x.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()

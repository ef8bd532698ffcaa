"""What layers keep of their input, and what follows: for functions, modules, mixed batches and accelerated PEFT alike."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import peftkern
from peftkern import LoRALinear, lora_linear, multi_lora_linear, sgmv
from peftkern.autograd import saved as reading

ONE_BY_ONE = pytest.mark.skipif(
    not reading.READS_ONE_BY_ONE, reason="this torch cannot say which saved tensor has changed"
)

K, N, R, B, T = 24, 10, 3, 3, 8
IDS = torch.tensor([1, 0, 1])


def _parameters():
    g = torch.Generator().manual_seed(1)
    made = [torch.randn(s, generator=g) for s in ((N, K), (R, K), (N, R), (2, K), (N, 2))]
    return [nn.Parameter(t, requires_grad=i > 0) for i, t in enumerate(made)]


def _lora_linear():
    W, A, B, *_ = _parameters()
    return SimpleNamespace(call=lambda x: lora_linear(x, W, A, B), A=A, B=B)


def _many(call):
    W, A, B, A2, B2 = _parameters()
    return SimpleNamespace(call=lambda x: call(x, W, [(A2, B2, 1.0), (A, B, 1.0)]), A=A, B=B)


def _module():
    W, A, B, *_ = _parameters()
    model = nn.ModuleDict({"block": nn.ModuleDict({"proj": LoRALinear(K, N, r=R, bias=False)})})
    layer = model["block"]["proj"]
    layer.weight, layer.lora_A, layer.lora_B = W, A, B
    return SimpleNamespace(call=layer, A=A, B=B, model=model, name="block.proj.lora_A")


def _peft(names=None):
    peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
    base = nn.ModuleDict({"proj": nn.Linear(K, N, bias=False)})
    config = peft.LoraConfig(r=R, target_modules=["proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    assert peftkern.accelerate(model).accelerated == ["base_model.model.proj"]
    layer = model.base_model.model["proj"]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    call = layer if names is None else lambda x: layer(x, adapter_names=names[: x.shape[0]])
    return SimpleNamespace(call=call, A=A, B=B, model=model, name="base_model.model.proj.lora_A.default.weight")


LAYERS = {
    "lora_linear": _lora_linear,
    "multi_lora_linear": lambda: _many(lambda x, W, adapters: multi_lora_linear(x, W, adapters, IDS)),
    "sgmv": lambda: _many(lambda x, W, adapters: sgmv(x, adapters, IDS)),
    "LoRALinear": _module,
    "PEFT": _peft,
    "PEFT, adapter_names": lambda: _peft(["default"] * B),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    """A callable, its lora_A and lora_B, and where it has them a model and the name of lora_A in it."""
    return LAYERS[request.param]()


def gradients(layer, x, change=lambda h, y: y):
    """Of x, lora_A and lora_B, of a loss of what ``change`` makes of a hidden state and the layer's output."""
    x = x.detach().clone().requires_grad_()
    h = x * 1.0
    loss = change(h, layer.call(h)).square().sum()
    return torch.autograd.grad(loss, [x, layer.A, layer.B])


def saved(function):
    """Bytes of all storages that a call keeps for backward, beside parameters; and its result."""
    found = {}

    def pack(t):
        if not isinstance(t, nn.Parameter) and t.is_floating_point():
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    return sum(found.values()), y


def add(h, y):
    h += y.mean(-1, keepdim=True)
    return h


def add_apart(h, y):
    return h + y.mean(-1, keepdim=True)


@ONE_BY_ONE
def test_an_input_that_changes_in_place(layer, monkeypatch):
    x = torch.randn(B, T, K)
    with pytest.raises(RuntimeError, match="x was changed in place") as caught:
        gradients(layer, x, add)
    text = str(caught.value)
    assert "PEFTKERN_SAVE_INPUT=copy" in text and "h = h + y" in text and getattr(layer, "name", "") in text
    expected = gradients(layer, x, add_apart)
    monkeypatch.setenv("PEFTKERN_SAVE_INPUT", "copy")
    torch.testing.assert_close(gradients(layer, x, add), expected)
    monkeypatch.setenv("PEFTKERN_SAVE_INPUT", "yes")
    with pytest.raises(ValueError, match="PEFTKERN_SAVE_INPUT='yes' is not one of shared, copy"):
        gradients(layer, x, add)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_dropout_and_fp32_adapters_as_stock_allows_it(dtype, monkeypatch):
    layer = LoRALinear(K, N, r=R, lora_dropout=0.5, dtype=dtype)
    nn.init.normal_(layer.lora_B)
    layer = SimpleNamespace(call=layer, A=layer.lora_A, B=layer.lora_B)
    x = torch.randn(B, T, K).to(dtype)

    def run(change):
        torch.manual_seed(7)
        return gradients(layer, x, change)

    expected = run(add_apart)
    with pytest.raises(RuntimeError, match="PEFTKERN_SAVE_INPUT"):
        run(add)
    monkeypatch.setenv("PEFTKERN_SAVE_INPUT", "copy")
    assert all(map(torch.equal, run(add), expected))


@pytest.mark.parametrize("change", [lambda h, y: h.relu_() * y.sum(), lambda h, y: h.view(-1).zero_() * y.sum()])
def test_other_changes_in_place(layer, change):
    with pytest.raises(RuntimeError, match="PEFTKERN_SAVE_INPUT"):
        gradients(layer, torch.randn(B, T, K), change)


@ONE_BY_ONE
def test_an_input_that_no_gradient_reads_may_change(layer):
    layer.A.requires_grad_(False)
    h = torch.randn(B, T, K, requires_grad=True) * 1.0
    y = layer.call(h)
    h.zero_()
    assert torch.autograd.grad(y.sum(), layer.B)[0].any()


@ONE_BY_ONE
def test_a_parameter_that_changes_is_named(layer):
    x = torch.randn(B, T, K, requires_grad=True)
    y = layer.call(x)
    with torch.no_grad():
        layer.B.mul_(2)
    with pytest.raises(RuntimeError, match=r"(lora_B|adapter's part) was changed in place") as caught:
        y.sum().backward()
    assert "PEFTKERN_SAVE_INPUT" not in str(caught.value) and getattr(layer, "name", "") in str(caught.value)


def test_a_torch_that_cannot_read_one_names_the_layer(layer, monkeypatch):
    monkeypatch.setattr(reading, "READS_ONE_BY_ONE", False)
    y = layer.call(torch.randn(B, T, K, requires_grad=True))
    with torch.no_grad():
        layer.B.mul_(2)
    with pytest.raises(RuntimeError, match="x or a parameter was changed in place") as caught:
        y.sum().backward()
    assert getattr(layer, "name", "") in str(caught.value)


VECTORS = dict(rank_scale=R, base_in_scale=K, delta_in_scale=K, base_out_scale=N, delta_out_scale=N)


@ONE_BY_ONE
@pytest.mark.parametrize("drops", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("scaled", [False, True], ids=["LoRA", "vectors"])
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "seed", *VECTORS])
def test_any_tensor_that_changes_is_named(name, scaled, drops):
    W, A, B, *_ = _parameters()
    t = dict(weight=W, lora_A=A, lora_B=B, seed=torch.tensor([3]))
    t |= {v: nn.Parameter(torch.randn(size)) for v, size in VECTORS.items()} if scaled else {}
    if name not in t or (name == "seed" and not drops):
        return
    x = torch.randn(2, K, requires_grad=True)
    y = lora_linear(x, **t, dropout_p=0.5 * drops, training=True)
    with torch.no_grad():
        t[name].mul_(2)
    with pytest.raises(RuntimeError, match=f"lora_linear: {name} was changed in place"):
        y.sum().backward()


@ONE_BY_ONE
@pytest.mark.parametrize("x_trains", [False, True])
def test_parameters_step_one_after_the_other(layer, x_trains):
    x = torch.randn(B, T, K, requires_grad=x_trains)
    expected = torch.autograd.grad(layer.call(x).square().sum(), layer.B)[0]
    loss = layer.call(x).square().sum()
    loss.backward(inputs=[layer.A], retain_graph=True)
    with torch.no_grad():
        layer.A.sub_(layer.A.grad)
    loss.backward(inputs=[layer.B], retain_graph=True)
    torch.testing.assert_close(layer.B.grad, expected)
    again = torch.autograd.grad(loss, layer.B, retain_graph=True)[0]
    torch.testing.assert_close(again, expected)
    if x_trains:
        with pytest.raises(RuntimeError, match=r"(lora_A|adapter's part) was changed in place"):
            torch.autograd.grad(loss, x)


def test_inference_tensors_train(layer):
    with torch.inference_mode():
        x = torch.randn(B, T, K)
    ours = torch.autograd.grad(layer.call(x).square().sum(), [layer.A, layer.B])
    theirs = torch.autograd.grad(layer.call(x.clone()).square().sum(), [layer.A, layer.B])
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    "cut", [lambda h: h[:, -1:], lambda h: h[:, :3].detach(), lambda h: h[..., ::2].repeat(1, 1, 2)[:, 2:3]],
    ids=["last", "detached", "strided"],
)  # fmt: skip
def test_a_part_of_a_hidden_state_is_kept_alone(layer, cut):
    h = torch.randn(B, 16 * T, K, requires_grad=True) * 1.0
    part = cut(h)
    size, y = saved(lambda: layer.call(part))
    rows = part.shape[:-1].numel()
    assert size <= 4 * rows * (K + 2 * R) + 256
    expected = torch.autograd.grad(layer.call(part.contiguous().clone()).sum(), [layer.A, layer.B])
    torch.testing.assert_close(torch.autograd.grad(y.sum(), [layer.A, layer.B]), expected)


def test_layers_with_one_input_share_what_is_kept(layer, monkeypatch):
    others = [copy.copy(layer) for _ in range(2)]
    h = torch.randn(B, 16 * T, K)
    x, branch = B * T * K * 4, B * T * 2 * R * 4 + 256

    def three(part):
        return saved(lambda: [each.call(part) for each in (layer, *others)])[0]

    assert three(h[:, :T]) <= x + 3 * branch, "a compact copy"
    whole = torch.randn(B, T, K)
    assert three(whole) <= x + 3 * branch, "the input itself"
    with torch.autocast("cpu", torch.bfloat16):
        assert three(whole) <= x // 2 + 3 * branch, "what autocast makes of it"
    monkeypatch.setenv("PEFTKERN_SAVE_INPUT", "copy")
    kept = three(whole)
    assert kept <= x + 3 * branch, "a copy"


def test_a_shared_copy_is_of_the_input_as_it_was(layer, monkeypatch):
    monkeypatch.setenv("PEFTKERN_SAVE_INPUT", "copy")
    x = torch.randn(B, T, K)
    expected = [torch.autograd.grad(layer.call(v).sum(), layer.A)[0] for v in (x.clone(), x + 1)]
    first = layer.call(x)
    x += 1
    second = layer.call(x)
    torch.testing.assert_close([torch.autograd.grad(y.sum(), layer.A)[0] for y in (first, second)], expected)


def test_autocast_keeps_the_smaller(layer):
    x = torch.randn(B, T, K, requires_grad=True)
    low = x.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        size, y = saved(lambda: layer.call(x))
        assert size <= low.nbytes + B * T * 2 * R * 4 + 256
        kept, z = saved(lambda: layer.call(low))
    assert kept <= size
    torch.testing.assert_close(
        *[torch.autograd.grad(v.float().square().sum(), [layer.A, layer.B]) for v in (y, z)], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_several_output_gradients_at_once(layer, how):
    x = torch.randn(B, T, K, requires_grad=True)
    y = layer.call(x)
    dy, wanted = torch.randn(4, *y.shape), [x, layer.A, layer.B]

    def pull(v):
        return torch.autograd.grad(y, wanted, v, retain_graph=True)

    expected = [torch.stack(g) for g in zip(*map(pull, dy), strict=True)]
    if how == "vmap":
        found = torch.func.vmap(pull)(dy)
    else:
        found = torch.autograd.grad(y, wanted, dy, is_grads_batched=True)
    torch.testing.assert_close(list(found), expected)


def test_jacobian_vectorized(layer):
    x = torch.randn(B, 1, K)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(layer.call, x, vectorize=True), jacobian(layer.call, x))


@ONE_BY_ONE
def test_sgmv_into_what_another_layer_saved():
    layer = LAYERS["LoRALinear"]()
    h = torch.randn(B, T, K, requires_grad=True) * 1.0
    y = layer.call(h)
    with torch.no_grad():
        adapters = [(torch.randn(R, 2), torch.randn(K, R), 1.0)]
        sgmv(torch.randn(B, T, 2), adapters, torch.zeros(B, dtype=torch.int64), out=h)
    with pytest.raises(RuntimeError, match="x was changed in place"):
        y.sum().backward()

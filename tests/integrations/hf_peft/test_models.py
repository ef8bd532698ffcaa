"""Whole models: accelerated PEFT against stock PEFT and against stock PEFT in fp64."""

import statistics

import pytest
import torch

import peftkern

KINDS = {"llama": 12, "bert": 13, "gpt2": 8}


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_every_gradient(zoo, fused, kind):
    stock = zoo.build(kind, bias="lora_only")
    ours = zoo.copy(stock)
    report = peftkern.accelerate(ours)
    assert len(report.accelerated) == KINDS[kind] and not report.skipped
    ratios = []
    for seed in range(9):
        inputs = zoo.batch(kind, seed=seed)
        exact = zoo.loss_and_gradients(zoo.copy(stock).double(), inputs)
        theirs, mine = zoo.loss_and_gradients(stock, inputs), zoo.loss_and_gradients(ours, inputs)
        torch.testing.assert_close(mine[1].double(), exact[1], rtol=1e-5, atol=1e-5)
        assert mine[2].keys() == theirs[2].keys()
        assert any("lora_A" in n for n in mine[2]) and any(n.endswith("base_layer.bias") for n in mine[2])
        # A single gradient may be zero but for rounding (BERT's key bias is): 4 ulp of the largest one pass.
        floor = 4.0 * 2.0**-24 * max(g.abs().max().item() for g in exact[2].values())
        for name, g in exact[2].items():
            torch.testing.assert_close(mine[2][name].double(), g, rtol=1e-4, atol=floor + 1e-5 * g.abs().max().item())
        errors = [[(m[2][n].double() - exact[2][n]).norm() for n in exact[2]] for m in (mine, theirs)]
        ratios.append((torch.stack(errors[0]).norm() / torch.stack(errors[1]).norm()).item())
    assert len(fused) == 9 * KINDS[kind]
    # Rounding errors run through all layers, so they are judged together, and in the median: a single batch may
    # amplify the errors of either side by luck.
    assert statistics.median(ratios) <= 1.5, ratios


@pytest.mark.parametrize(
    "base, autocast", [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)], ids=str
)
def test_error_in_bf16_is_no_larger_than_stock(zoo, fused, base, autocast):
    # Over all gradients of a model together: one gradient of a chaotic function may be off by luck.
    inputs = zoo.batch("llama")
    stock = zoo.build("llama", lora_bias=True)
    for layer in zoo.lora_layers(stock).values():
        layer.base_layer.to(base)
    if not autocast:
        for name, module in stock.named_modules():
            if "lora_" not in name and not name.endswith("base_layer") and not list(module.children()):
                module.to(base)
    exact = zoo.loss_and_gradients(zoo.copy(stock).double(), inputs)
    ours = zoo.copy(stock)
    assert len(peftkern.accelerate(ours).accelerated) == 12
    errors = {}
    for name, model in (("stock", stock), ("ours", ours)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, logits, grads = zoo.loss_and_gradients(model, inputs)
        assert grads.keys() == exact[2].keys()
        assert all(
            g.dtype == p.dtype for g, p in zip(grads.values(), (p for p in model.parameters() if p.requires_grad))
        )
        squares = [(grads[n].double() - exact[2][n]).square().sum() for n in grads]
        errors[name] = (torch.stack(squares).sum().sqrt().item(), (logits.double() - exact[1]).norm().item())
    assert len(fused) == 12
    assert errors["ours"][0] <= 1.5 * errors["stock"][0] and errors["ours"][1] <= 1.5 * errors["stock"][1], errors


@pytest.mark.parametrize("kind", KINDS)
def test_optimiser_steps(zoo, kind):
    stock = zoo.build(kind)
    ours = zoo.copy(stock)
    peftkern.accelerate(ours)
    losses = []
    for model in (stock, ours):
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses.append([])
        for step in range(4):
            loss = model(**zoo.batch(kind, seed=step)).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][0] - losses[0][-1] != 0.0
    assert abs(losses[0][0] - losses[0][-1]) > 1e-3
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    for (name, a), (_, b) in zip(stock.named_parameters(), ours.named_parameters()):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype, autocast", [("float32", False), ("bfloat16", False), ("float32", True)], ids=str)
def test_qkv_save_their_input_once(zoo, p, dtype, autocast):
    # One saved tensor however many projections read it: x itself, or what autocast made of it, which is smaller; no mask.
    model = zoo.build("llama", lora_dropout=p).train()
    peftkern.accelerate(model)
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(4, 16, 32, dtype=getattr(torch, dtype), requires_grad=True)
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    for layer in projections:
        layer.base_layer.to(x.dtype)
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t  # keeps it alive: no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", enabled=autocast):
        outputs = [layer(x) for layer in projections]
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {k: t.untyped_storage().nbytes() for k, t in seen.items() if k not in parameters}
    if autocast:
        casts = [k for k, t in seen.items() if t.dtype == torch.bfloat16 and t.numel() == x.numel()]
        assert x.untyped_storage().data_ptr() not in saved and len(casts) == 1
        assert saved.pop(casts[0]) == x.numel() * 2
    else:
        assert saved.pop(x.untyped_storage().data_ptr()) == x.numel() * x.element_size()
    # Beside it: u (M, R) in fp32 for each of the three, and a seed.
    assert sum(saved.values()) <= 3 * (4 * 64 * 4 + 8), saved
    assert all(y.dtype == (torch.bfloat16 if autocast else x.dtype) for y in outputs)


def test_generation(zoo, fused):
    model = zoo.build("llama").eval()
    prompt = {"input_ids": torch.tensor([[1, 5, 9]]), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**prompt)
    peftkern.accelerate(model)
    assert torch.equal(model.generate(**prompt), expected)
    assert len(fused) >= 5 * 12


@pytest.mark.slow(10)
def test_compiled_layer_and_model(zoo, fused):
    model, layer = zoo.layer(lora_dropout=0.25)
    x = torch.randn(6, 24)
    peftkern.accelerate(model)
    compiled = torch.compile(layer, fullgraph=True)
    layer.eval()
    expected = layer(x)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    layer.train()
    torch.manual_seed(5)
    compiled(x).sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0
    # The graph watches what the guard read: restore, then a hook.
    layer.eval()
    peftkern.restore(model)
    before = len(fused)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    assert len(fused) == before
    bert = zoo.build("bert").base_model.model.eval()
    inputs = zoo.batch("bert")
    expected = bert(**inputs).logits
    peftkern.accelerate(bert)
    before = len(fused)
    torch.testing.assert_close(torch.compile(bert, fullgraph=True)(**inputs).logits, expected, rtol=1e-4, atol=1e-5)

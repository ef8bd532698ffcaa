"""attach_adapters: a plain model and a folder of checkpoints give what PEFT gives, row by row; add, remove, use."""

import asyncio
import contextvars
import copy
import gc
import pickle
import random
import threading
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern.integrations.attach import layer as attach_layer

NAMES = ["first", None, "second", "third", "first", "second"]
KINDS = ["llama", "qwen2", "bert", "gpt2"]


@pytest.fixture
def served(zoo, tmp_path):
    """kind -> (plain model, its PEFT twin, {name: folder}) with the same weights."""

    def make(kind, **adapters):
        twin = zoo.several(kind, **adapters)
        twin.save_pretrained(tmp_path)
        plain = zoo.copy(twin).unload().eval()
        return plain, twin, {name: tmp_path / name for name in twin.peft_config}

    return make


def inputs_of(zoo, kind, rows):
    inputs = zoo.batch(kind, rows=rows)
    del inputs["labels"]
    return inputs


def peft_names(names):
    return ["__base__" if name is None else name for name in names]


@pytest.fixture
def calls(monkeypatch):
    """Ids of each fused call."""
    seen = []

    def counting(x, weight, bank, ids, **options):
        seen.append(ids)
        return peftkern.multi_lora_linear(x, weight, bank, ids, **options)

    monkeypatch.setattr(attach_layer, "multi_lora_linear", counting)
    return seen


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_batch_equals_peft(zoo, served, calls, kind):
    plain, twin, folders = served(kind)
    inputs = inputs_of(zoo, kind, len(NAMES))
    base = plain(**inputs)[0]
    stock = twin(**inputs, adapter_names=peft_names(NAMES))[0]
    exact = zoo.copy(twin).double()(**inputs, adapter_names=peft_names(NAMES))[0]
    keys, parameters = list(plain.state_dict()), [id(p) for p in plain.parameters()]
    multi = peftkern.attach_adapters(plain, folders)
    assert list(plain.state_dict()) == keys and [id(p) for p in plain.parameters()] == parameters
    assert multi.names == ["first", "second", "third"] and len(multi.layers) == len(zoo.lora_layers(twin))
    with multi.use(NAMES):
        ours = plain(**inputs)[0]
    assert len(calls) == len(multi.layers)
    zoo.as_accurate(ours, stock, exact)
    # Outside of use, and for a batch of None, it is the base model, bit for bit.
    assert torch.equal(plain(**inputs)[0], base)
    with multi.use([None] * len(NAMES)):
        assert torch.equal(plain(**inputs)[0], base)
    assert len(calls) == len(multi.layers)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_generation_equals_each_prompt_alone(zoo, served, kind):
    plain, _, folders = served(kind)
    inputs = zoo.batch(kind, rows=len(NAMES))["input_ids"]
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    multi = peftkern.attach_adapters(plain, folders)
    with multi.use(NAMES):
        together = plain.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **options)
    alone = []
    for row, name in zip(inputs, NAMES):
        with multi.use([name]):
            row = {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
            alone.append(plain.generate(**row, **options)[0])
    assert len({tuple(row.tolist()) for row in alone}) == len(NAMES)
    for row, expected in zip(together, alone):
        assert torch.equal(row[: len(expected)], expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_copies_of_a_prompt_repeat_its_name(zoo, served, calls, options):
    plain, twin, folders = served("llama")
    inputs = zoo.batch("llama", rows=len(NAMES))["input_ids"]
    options = dict(max_new_tokens=5, pad_token_id=0, **options)
    copies = options.get("num_beams") or options["num_return_sequences"]
    multi = peftkern.attach_adapters(plain, folders)
    with multi.use(NAMES):
        torch.manual_seed(1)
        ours = plain.generate(inputs, **options)
    assert len(calls) >= 5 * 8 and all(len(ids) == copies * len(NAMES) for ids in calls)
    if "num_beams" not in options:
        # PEFT repeats names for beams only; the prompts are repeated by hand then.
        inputs = inputs.repeat_interleave(copies, 0)
        del options["num_return_sequences"]
        names = [name for name in NAMES for _ in range(copies)]
        torch.manual_seed(1)
        assert torch.equal(ours, twin.generate(inputs, adapter_names=peft_names(names), **options))
    else:
        for i, name in enumerate(NAMES):
            with multi.use([name]):
                alone = plain.generate(inputs[i : i + 1], **options)[0]
            assert torch.equal(ours[i][: len(alone)], alone)


@torch.no_grad()
def test_add_and_remove(zoo, served, calls):
    plain, twin, folders = served("llama")
    inputs = inputs_of(zoo, "llama", 2)
    multi = peftkern.attach_adapters(plain, {"third": folders["third"]})
    few = len(multi.layers)
    assert 0 < few < 12 and len(multi) == 1 and "third" in multi and "first" not in multi
    multi.add("first", str(folders["first"]))
    assert len(multi.layers) == 12 and multi.names == ["third", "first"]
    expected = twin(**inputs, adapter_names=["first", "third"]).logits
    with multi.use(["first", "third"]):
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    # The same name for another adapter.
    multi.remove("first")
    multi.add("first", folders["second"])
    with multi.use(["first", "third"]):
        again = plain(**inputs).logits
    expected = twin(**inputs, adapter_names=["second", "third"]).logits
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)
    for name in ("first", "third"):
        multi.remove(name)
    assert not multi.names and not any(map(len, multi.banks.values()))
    with pytest.raises(KeyError, match="first"), multi.use(["first", None]):
        pass
    with pytest.raises(KeyError, match="first"):
        multi.remove("first")


@torch.no_grad()
def test_a_request_keeps_its_adapters_until_it_ends(zoo, served):
    plain, _, folders = served("llama")
    inputs = inputs_of(zoo, "llama", 2)
    multi = peftkern.attach_adapters(plain, folders, max_adapters=3)
    with multi.use(["first", "second"]):
        expected = plain(**inputs).logits
        multi.remove("first")
        # Its room is still taken, its name is free, and a request inside does not find it.
        with pytest.raises(RuntimeError, match=r"no room.*3 of 3"):
            multi.add("fourth", folders["third"])
        with pytest.raises(KeyError), multi.use(["first", None]):
            pass
        multi.remove("third")
        multi.add("first", folders["third"])
        assert torch.equal(plain(**inputs).logits, expected)
        with multi.use(["first", "second"]):
            assert not torch.equal(plain(**inputs).logits, expected)
        assert torch.equal(plain(**inputs).logits, expected)
    multi.add("fourth", folders["third"])
    assert all(len(bank) <= 3 for bank in multi.banks.values())


@torch.no_grad()
def test_layers_share_ids_and_routes(zoo, served, calls):
    class Routes(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Routes.count += func is torch.ops.peftkern.multi_lora_linear_route.default
            return func(*args, **(kwargs or {}))

    plain, _, folders = served("llama", one={"r": 4}, two={"r": 9}, three={"r": 2})
    multi = peftkern.attach_adapters(plain, folders)
    multi.remove("two")
    multi.add("two", folders["one"])
    with Routes(), multi.use(["two", None, "three"]):
        plain(**inputs_of(zoo, "llama", 3))
        assert Routes.count == 1 and len({id(ids) for ids in calls}) == 1 and len(calls) == 12
        plain(**inputs_of(zoo, "llama", 3))
        assert Routes.count == 1


def test_requests_belong_to_their_context(zoo, served):
    plain, _, folders = served("llama")
    inputs = inputs_of(zoo, "llama", 1)
    multi = peftkern.attach_adapters(plain, folders)

    @torch.no_grad()
    def run(*names):
        if not names:
            return plain(**inputs).logits
        with multi.use(names[:1]):
            return run(*names[1:])

    base = run()
    expected = {name: run(name) for name in folders}
    assert len({tuple(y.flatten().tolist()) for y in (base, *expected.values())}) == 4
    assert torch.equal(run("first", "second"), expected["second"])
    assert torch.equal(run("first", None), base)
    results = []
    with multi.use(["first"]):
        thread = threading.Thread(target=lambda: contextvars.Context().run(lambda: results.append(run())))
        thread.start()
        thread.join()
        results.append(contextvars.copy_context().run(run))
    assert torch.equal(results[0], base) and torch.equal(results[1], expected["first"])

    async def serve(name):
        with multi.use([name]):
            await asyncio.sleep(0.01)
            result = run()
            await asyncio.sleep(0.01)
            return result

    async def all_at_once():
        return await asyncio.gather(*(serve(name) for name in folders))

    for name, y in zip(folders, asyncio.run(all_at_once())):
        assert torch.equal(y, expected[name])
    assert torch.equal(run(), base)


def test_threads_add_and_remove_while_others_run(zoo, served):
    plain, _, folders = served("llama")
    inputs = inputs_of(zoo, "llama", 2)
    multi = peftkern.attach_adapters(plain, {"kept": folders["first"]}, max_adapters=8)
    sources = list(folders)
    expected = {}
    with torch.no_grad():
        for source in sources:
            multi.add(source, folders[source])
            with multi.use([source, "kept"]):
                expected[source] = plain(**inputs).logits
    stop, errors, checked = threading.Event(), [], []

    def forward(seed):
        choose = random.Random(seed)
        while not stop.is_set():
            source = choose.choice(sources)
            try:
                with multi.use([source, "kept"]), torch.no_grad():
                    y = plain(**inputs).logits
            except KeyError:
                continue
            except Exception as error:
                errors.append(error)
                return
            if not torch.allclose(y, expected[source], rtol=1e-4, atol=1e-5):
                errors.append(AssertionError(source))
            checked.append(source)

    threads = [threading.Thread(target=forward, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        for i in range(40):
            source = sources[i % 3]
            multi.remove(source)
            while source not in multi:
                try:
                    multi.add(source, folders[source])
                except RuntimeError:  # full of adapters that are still in use
                    threading.Event().wait(0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors and checked
    assert multi.in_use == 0 and all(len(bank) <= 4 for bank in multi.banks.values())


def test_batches_that_do_not_fit(zoo, served):
    plain, _, folders = served("bert")
    multi = peftkern.attach_adapters(plain, folders)
    inputs = inputs_of(zoo, "bert", 3)
    with multi.use(["first", "second"]), pytest.raises(ValueError, match=r"names 2 sequences, but .* shape \(3, 7\)"):
        plain(**inputs)
    with multi.use([]), pytest.raises(ValueError, match="names 0 sequences"):
        plain(**inputs)
    for names in (3, {"first"}, iter(["first"])):
        with pytest.raises(TypeError, match="names must be a list"):
            multi.use(names)
    with multi.use(["first", "second", None]):
        plain(**inputs)
    assert multi.in_use == 0


def test_gradients_of_a_model_that_is_not_frozen(zoo, served, calls):
    plain, twin, folders = served("llama")
    inputs = inputs_of(zoo, "llama", len(NAMES))
    plain.requires_grad_(True)
    multi = peftkern.attach_adapters(plain, folders)
    with torch.no_grad(), multi.use(NAMES):
        expected = plain(**inputs).logits
    before = len(calls)
    with multi.use(NAMES):
        y = plain(**inputs).logits
        y.square().mean().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == before
    twin.requires_grad_(False)
    for p in (m.base_layer.weight for m in zoo.lora_layers(twin).values()):
        p.requires_grad_(True)
    twin(**inputs, adapter_names=peft_names(NAMES)).logits.square().mean().backward()
    grads = dict(plain.named_parameters())
    for name, layer in zoo.lora_layers(twin).items():
        ours = grads[name.removeprefix("base_model.model.") + ".weight"].grad
        torch.testing.assert_close(ours, layer.base_layer.weight.grad, rtol=1e-3, atol=1e-6)
    plain.requires_grad_(False)
    with multi.use(NAMES):
        embeddings = torch.randn(len(NAMES), 3, 32, requires_grad=True)
        plain(inputs_embeds=embeddings).logits.square().mean().backward()
    assert embeddings.grad.abs().sum() > 0 and len(calls) == before + 12


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["float32", "bfloat16"])
@torch.no_grad()
def test_dtypes(zoo, served, tmp_path, model, stored):
    plain, twin, folders = served("llama")
    twin.to(getattr(torch, stored)).save_pretrained(tmp_path)
    plain.to(getattr(torch, model))
    multi = peftkern.attach_adapters(plain, folders)
    kept = {bank.dtype for bank in multi.banks.values()}
    assert kept == {torch.bfloat16 if (model, stored) == ("bfloat16", "bfloat16") else torch.float32}
    inputs = inputs_of(zoo, "llama", len(NAMES))
    exact = zoo.copy(twin).double()
    for (_, a), (_, b) in zip(sorted(zoo.lora_layers(exact).items()), sorted(zoo.lora_layers(twin).items())):
        a.base_layer.weight.copy_(b.base_layer.weight.to(getattr(torch, model)))
    expected = exact(**inputs, adapter_names=peft_names(NAMES)).logits
    with multi.use(NAMES):
        y = plain(**inputs).logits
    assert y.dtype == getattr(torch, model)
    relative = (y.double() - expected).norm() / expected.norm()
    assert relative < (0.05 if "bfloat16" in (model, stored) else 1e-5)


def test_a_dtype_that_is_asked_for(zoo, served):
    plain, _, folders = served("llama")
    with pytest.raises(
        ValueError, match=r"dtype is torch.bfloat16, but model.layers.0.* takes adapters in torch.float32$"
    ):
        peftkern.attach_adapters(plain, folders, dtype=torch.bfloat16)
    assert not any("forward" in vars(m) for m in plain.modules())
    multi = peftkern.attach_adapters(plain.bfloat16(), folders, dtype=torch.bfloat16)
    assert {bank.dtype for bank in multi.banks.values()} == {torch.bfloat16}


@torch.no_grad()
def test_copies_pickles_and_detach(zoo, served):
    plain, _, folders = served("gpt2")
    inputs = inputs_of(zoo, "gpt2", 2)
    base = plain(**inputs).logits
    multi = peftkern.attach_adapters(plain, folders)
    with multi.use(["first", "second"]):
        assert not torch.equal(plain(**inputs).logits, base)
        for other in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
            assert torch.equal(other(**inputs).logits, base)
            # Its forward works on its own weights.
            other.transformer.h[0].attn.c_attn.weight.zero_()
            assert not torch.equal(other(**inputs).logits, base)
    multi.detach()
    multi.detach()
    assert torch.equal(plain(**inputs).logits, base) and not multi.names
    assert not any("forward" in vars(m) for m in plain.modules())
    again = peftkern.attach_adapters(plain, folders)
    with pytest.raises(ValueError, match="attached already"):
        peftkern.attach_adapters(plain, folders)
    assert again.names == list(folders)


def test_nothing_is_kept_alive(zoo, served):
    plain, _, folders = served("llama")
    multi = peftkern.attach_adapters(plain, folders)
    with multi.use(["first"]):
        plain(torch.tensor([[1, 2]]))
    watch = weakref.ref(plain), weakref.ref(multi)
    del plain, multi
    gc.collect()
    assert watch[0]() is None and watch[1]() is None


def test_hooks_of_a_layer_run(zoo, served):
    plain, _, folders = served("llama")
    multi = peftkern.attach_adapters(plain, folders)
    seen = []
    layer = plain.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda m, a, y: seen.append(y.shape))
    with multi.use(["first", None]):
        plain(**inputs_of(zoo, "llama", 2))
    with multi.use("first"):
        layer(input=torch.randn(2, 3, 32))
    assert seen == [(2, 7, 32), (2, 3, 32)]


def test_two_models_at_once(zoo, served):
    (a, _, folders), (b, _, _) = served("llama"), served("llama")
    inputs = inputs_of(zoo, "llama", 1)
    first, second = peftkern.attach_adapters(a, folders), peftkern.attach_adapters(b, folders)
    with torch.no_grad():
        base = a(**inputs).logits
        with first.use(["first"]):
            assert torch.equal(b(**inputs).logits, base)
            with second.use(["second"]):
                x, y = a(**inputs).logits, b(**inputs).logits
        with first.use(["first"]):
            assert torch.equal(a(**inputs).logits, x)
        with first.use(["second"]):
            assert torch.equal(a(**inputs).logits, y)


def test_repr_says_how_much_is_held(served):
    plain, _, folders = served("llama")
    assert repr(peftkern.attach_adapters(plain, folders)).startswith(
        "MultiLoRA(LlamaForCausalLM: 3 of 256 adapters, 12 layers,"
    )


def test_an_empty_start(zoo, served):
    plain, _, folders = served("llama")
    multi = peftkern.attach_adapters(plain, {})
    with multi.use([None, None]):
        plain(**inputs_of(zoo, "llama", 2))
    multi.add("first", folders["first"])
    with multi.use(["first", None]):
        plain(**inputs_of(zoo, "llama", 2))

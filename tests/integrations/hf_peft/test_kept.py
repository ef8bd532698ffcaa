"""Kept plans: taken when nothing has changed, and never when something has."""

import copy
import pickle
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as nn_module

import peftkern
from peftkern.integrations import hf_peft
from peftkern.integrations.hf_peft import forward as hf_peft_forward
from peftkern.integrations.hf_peft import kept as hf_peft_kept
from peftkern.methods import unchanged
from peftkern.methods.quantised import COMPUTE

pytestmark = pytest.mark.skipif(unchanged.Unchanged is None, reason="the native code is not built: no plan is kept")

PARTS = {
    "base": lambda m: m.base_layer,
    "A": lambda m: m.lora_A["default"],
    "B": lambda m: m.lora_B["default"],
    "dropout": lambda m: m.lora_dropout["default"],
}
HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
GLOBAL = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def nothing(*args):
    return None


def _after(change):
    def case(layer, x, check, patch):
        change(layer)
        check(x)

    return case


def _input(change):
    return lambda layer, x, check, patch: check(change(x))


def _patched(where, name, value):
    def case(layer, x, check, patch):
        patch.setattr(where, name, value)
        check(x)

    return case


def _global_hook(name):
    def case(layer, x, check, patch):
        patch.setitem(getattr(nn_module, f"_global_{name}"), 0, nothing)
        check(x)

    return case


def _within(make):
    def case(layer, x, check, patch):
        with make(x):
            check(x)

    return case


def _other_dtype(part, name, change):
    def do(layer):
        t = getattr(PARTS[part](layer), name)
        t.data = change(t.data)

    return _after(do)


def _conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D


# What may change between two calls of a layer so that the plan of the first is wrong for the second.
CHANGES = {
    **{f"{hook} of {part}": _after(lambda m, p=part, h=hook: getattr(PARTS[p](m), f"register_{h}")(nothing))
       for part in PARTS for hook in HOOKS},
    **{f"forward of {part}": _after(lambda m, p=part: setattr(PARTS[p](m), "forward", nothing)) for part in PARTS},
    **{f"class of {part}": _after(lambda m, p=part: setattr(PARTS[p](m), "__class__", type("Mine", (type(PARTS[p](m)),), {})))
       for part in PARTS},
    **{f"global {hook}": _global_hook(hook) for hook in GLOBAL},
    **{f"class forward of {cls.__name__}": _patched(cls, "forward", nothing) for cls in (nn.Linear, nn.Dropout, _conv1d())},
    **{f"dtype of {part}": _other_dtype(part, "weight", torch.Tensor.double) for part in ("base", "A", "B")},
    "dtype of the bias": _other_dtype("base", "bias", torch.Tensor.double),
    "compute": _after(lambda m: setattr(m, COMPUTE, "int8")),
    "base trains": _after(lambda m: m.base_layer.weight.requires_grad_()),
    "no bias any more": _after(lambda m: setattr(m.base_layer, "bias", None)),
    "bias of A": _after(lambda m: setattr(m.lora_A["default"], "bias", nn.Parameter(torch.ones(4)))),
    "bias of B": _after(lambda m: setattr(m.lora_B["default"], "bias", nn.Parameter(torch.ones(20)))),
    "forward of the layer": _after(lambda m: setattr(m, "forward", nothing)),
    "class of the layer": _after(lambda m: setattr(m, "__class__", type("Mine", (type(m),), {}))),
    "disabled": _after(lambda m: m.enable_adapters(False)),
    "merged": _after(lambda m: m.merged_adapters.append("default")),
    "no adapter active": _after(lambda m: m._active_adapter.clear()),
    "another adapter active too": _after(lambda m: m._active_adapter.append("other")),
    "active adapter deleted": _after(lambda m: m.lora_A.pop("default")),
    "B deleted": _after(lambda m: m.lora_B.pop("default")),
    "dropout deleted": _after(lambda m: m.lora_dropout.pop("default")),
    "variant": _after(lambda m: m.lora_variant.update(default=object())),
    "scaling": _after(lambda m: m.scaling.update(default=m.scaling["default"] * 2.0)),
    "scaling of another type": _after(lambda m: m.scaling.update(default=torch.tensor(m.scaling["default"]))),
    "p": _after(lambda m: setattr(m.lora_dropout["default"], "p", 0.25)),
    "in place": _after(lambda m: setattr(m.lora_dropout["default"], "inplace", True)),
    "evaluation": _after(lambda m: m.lora_dropout["default"].eval()),
    "other dropout": _after(lambda m: m.lora_dropout.update({"default": nn.AlphaDropout(0.5)})),
    "no casting": _after(lambda m: setattr(m, "cast_input_dtype_enabled", False)),
    "parametrised": _after(lambda m: nn.utils.parametrizations.weight_norm(m.base_layer)),
    "an input of another dtype": _input(torch.Tensor.double),
    "an input on another device": _input(lambda x: x.to("meta")),
    "an input of another size": _input(lambda x: x[:, :-1]),
    "an input without dimensions": _input(lambda x: x[0, 0]),
    "a sparse input": _input(torch.Tensor.to_sparse),
    "a nested input": _input(lambda x: torch.nested.nested_tensor([x, x[:2]])),
    "an input of another class": _input(nn.Parameter),
    "autocast": _within(lambda x: torch.autocast("cpu")),
    "forward differentiation": _within(lambda x: forward_ad.dual_level()),
    "compilation": _patched(torch.compiler, "_is_compiling_flag", True),
    "vmap": lambda layer, x, check, patch: torch.func.vmap(lambda t: (check(x), t)[1])(x),
    "jit.trace": lambda layer, x, check, patch: torch.jit.trace(lambda t: (check(x), t)[1], x, check_trace=False),
    "make_fx": lambda layer, x, check, patch: make_fx(lambda t: (check(x), t + 1)[1])(x),
    "a mixed batch that trained": lambda layer, x, check, patch: (hf_peft_forward.trained_mixed.add(layer), check(x)),
}  # fmt: skip
ON_BY_PATCH = {**CHANGES, "unpatch": _after(lambda m: hf_peft.unpatch())}


def kept_layer(zoo, monkeypatch, how, **options):
    """A layer that has been called, and the patterns of the plan that it keeps."""
    patterns = []

    def spy(*given):
        patterns[:] = given
        return unchanged.Unchanged(*given)

    monkeypatch.setattr(hf_peft_kept, "Unchanged", spy)
    model, layer = zoo.layer(lora_dropout=0.5, **options)
    if how == "accelerate":
        peftkern.accelerate(model)
    else:
        hf_peft.patch()
    x = torch.randn(5, 24)
    layer(x)
    return layer, x, tuple(patterns)


def entries(pattern, path=()):
    """Where a pattern says something that can be left out."""
    kind = pattern[0]
    for place in {"items": (1,), "object": (2, 3)}.get(kind, ()):
        for key, part in pattern[place].items():
            yield (*path, place, key)
            yield from entries(part, (*path, place, key))
    if kind in ("keep", "at"):
        yield from entries(pattern[2], (*path, 2))


def without(pattern, path):
    """The pattern without this entry. One that keeps a tensor goes on to keep it, whatever it is like."""
    place, *rest = path
    changed = list(pattern)
    if isinstance(pattern[place], dict):
        key, *rest = rest
        changed[place] = dict(pattern[place])
        if rest:
            changed[place][key] = without(pattern[place][key], rest)
        else:
            del changed[place][key]
    else:
        changed[place] = without(pattern[place], rest)
    return tuple(changed)


@pytest.fixture
def clean():
    yield
    hf_peft_forward.trained_mixed.clear()


@pytest.mark.parametrize("how", ["accelerate", "patch"])
def test_each_change_is_seen_and_each_entry_sees_one(zoo, monkeypatch, clean, how):
    checks = [unchanged.Unchanged, unchanged.PythonUnchanged]
    needed, misses = set(), set()
    for name, case in (CHANGES if how == "accelerate" else ON_BY_PATCH).items():
        with monkeypatch.context() as patch:
            layer, x, patterns = kept_layer(zoo, patch, how)
            whole = [check(*patterns) for check in checks]
            assert all(check.match(layer, x) is not None for check in whole), "not kept at all"
            says_nothing = unchanged.at(None, unchanged.same(None))
            fewer = {(i,): (*patterns[:i], says_nothing, *patterns[i + 1 :]) for i in range(2, len(patterns))}
            for i, pattern in enumerate(patterns):
                for path in entries(pattern):
                    fewer[(i, *path)] = patterns[:i] + (without(pattern, path),) + patterns[i + 1 :]
            fewer = {path: unchanged.Unchanged(*given) for path, given in fewer.items()}
            seen = []

            def check(x, name=name, layer=layer, whole=whole, fewer=fewer, seen=seen):
                seen.append(name)
                assert all(check.match(layer, x) is None for check in whole), f"not seen: {name}"
                misses.update(path for path, check in fewer.items() if check.match(layer, x) is not None)

            case(layer, x, check, patch)
            assert seen, name
        hf_peft_forward.trained_mixed.clear()
        hf_peft.unpatch()
        needed |= fewer.keys()
    # One pattern says nothing: it keeps the None that a plan has in the place of a tensor.
    unseen = {path for path in needed - misses if patterns[path[0]][:2] != ("at", None)}
    assert not unseen, "\n".join(map(str, sorted(unseen, key=str)))


CALLS = "_peftkern_calls"


def careless(monkeypatch):
    """From now on a careful look at a layer is an error."""

    def careful(*args):
        raise AssertionError("a careful look")

    monkeypatch.setattr(hf_peft_forward, "look_at_call", careful)


SETTINGS = {
    "training": ({"lora_dropout": 0.5}, torch.float32),
    "half precision": ({}, torch.bfloat16),
    "without bias": ({"bias": False}, torch.float32),
    "lora_bias": ({"lora_bias": True}, torch.float32),
    "rsLoRA": ({"use_rslora": True}, torch.float32),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_later_calls_look_no_more(zoo, monkeypatch, setting, autocast):
    options, dtype = SETTINGS[setting]
    model, layer = zoo.layer(**options, dtype=dtype)
    other = zoo.copy(model)
    peftkern.accelerate(model)
    peftkern.accelerate(other)
    x = torch.randn(5, 24, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", enabled=autocast):
        layer(x)
        careless(monkeypatch)
        torch.manual_seed(3)
        y = layer(x)
        y.float().square().sum().backward()
        monkeypatch.undo()
        torch.manual_seed(3)
        expected = other(x.detach())
    assert torch.equal(y, expected)
    expected.float().square().sum().backward()
    own, others = zoo.gradients(model), zoo.gradients(other)
    assert own and all(torch.equal(g, others[name]) for name, g in own.items())
    assert peftkern.status(model).fused == 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_looks_once(zoo, monkeypatch, kind):
    model, inputs = zoo.build(kind).eval(), zoo.batch(kind)
    peftkern.accelerate(model)
    first = model(**inputs).logits
    careless(monkeypatch)
    assert torch.equal(model(**inputs).logits, first)


def test_several_adapters_and_mixed_batches(zoo, monkeypatch):
    model = zoo.several("llama")
    model.base_model.set_adapter(["first", "second"])
    inputs = zoo.batch("llama")
    peftkern.accelerate(model)
    names = ["first", "__base__", "third"]
    for options in ({}, {"adapter_names": names}):
        first = model(**inputs, **options).logits
        with monkeypatch.context() as patch:
            careless(patch)
            assert torch.equal(model(**inputs, **options).logits, first)
    # Other adapters in the batch are another plan.
    assert not torch.equal(model(**inputs, adapter_names=names[::-1]).logits, first)


def test_weights_of_the_moment_are_used(zoo, fused):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    x = torch.randn(5, 24)
    layer(x)
    layer.base_layer.weight = nn.Parameter(torch.zeros(20, 24), requires_grad=False)
    layer.base_layer.bias = nn.Parameter(torch.zeros(20), requires_grad=False)
    layer.lora_A["default"].weight = nn.Parameter(torch.ones(7, 24))
    layer.lora_B["default"].weight.data = torch.ones(20, 7)
    torch.testing.assert_close(layer(x), (x.sum(1, keepdim=True) * 7 * layer.scaling["default"]).expand(5, 20))
    assert len(fused) == 2


def test_what_the_op_refuses_is_peft_s(zoo):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    x = torch.randn(5, 24)
    layer(x)
    weight = layer.lora_B["default"].weight
    weight.data = weight.data[:1]
    stock = zoo.copy(model)
    peftkern.restore(stock)
    assert torch.equal(layer(x), stock(x))  # PEFT's sum broadcasts
    weight.data = torch.ones(20, 3)
    with pytest.raises(RuntimeError):  # torch's
        layer(x)
    assert peftkern.status(model).fused == 1 and peftkern.status(model).stock == 2


def test_copies_pickles_and_replicas_have_no_kept_plan(zoo):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    x = torch.randn(5, 24)
    expected = layer(x)
    assert layer.__dict__[CALLS].kept is not None
    assert copy.deepcopy(layer).__dict__[CALLS].kept is None and copy.copy(layer)(x).equal(expected)
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.__dict__[CALLS] is None and torch.equal(loaded(x), expected)
    # A replica of DataParallel shares the counters, and has tensors of its own in the place of parameters.
    base = layer.base_layer._replicate_for_data_parallel()
    base.weight, base.bias = torch.zeros(20, 24), torch.zeros(20)
    replica = layer._replicate_for_data_parallel()
    replica._modules["base_layer"] = base
    assert not torch.equal(replica(x), expected) and torch.equal(layer(x), expected)


def test_no_weight_is_kept_alive(zoo):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    layer(torch.randn(5, 24))
    weights = [weakref.ref(p) for p in layer.parameters()]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert not any(w() is not None for w in weights)


def test_a_bias_that_begins_to_train_trains(zoo):
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    layer(torch.randn(5, 24))
    layer.base_layer.bias.requires_grad_()
    layer(torch.randn(5, 24)).sum().backward()
    torch.testing.assert_close(layer.base_layer.bias.grad, torch.full((20,), 5.0))


def test_restore_forgets(zoo):
    model, layer = zoo.layer()
    hf_peft.patch()
    layer(torch.randn(5, 24))
    peftkern.restore(model)
    layer(torch.randn(5, 24))
    assert CALLS not in layer.__dict__


def test_frames_of_a_call(zoo):
    # What a small layer's call costs is Python: beside the op, and torch's own two for a module, five frames.
    model, layer = zoo.layer()
    peftkern.accelerate(model.eval())
    x = torch.randn(5, 24)
    layer(x)
    frames = []

    def seen(frame, event, arg):
        if event == "call":
            frames.append(frame.f_code.co_name)

    sys.setprofile(seen)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    assert frames[:2] == ["_wrapped_call_impl", "_call_impl"]
    own = frames[2 : frames.index("lora_linear_with")]
    assert own[:5] == ["forward", "is_dynamo_compiling", "plan", "run", "alone"] and len(own) <= 6


def test_disabled_adapters_cost_no_look(zoo, monkeypatch):
    """What a reference model of a preference loss does at each step: the layer is not looked at, and the call is counted."""
    model, layer = zoo.layer()
    peftkern.accelerate(model)
    x = torch.randn(5, 24)
    layer(x)
    monkeypatch.setattr(hf_peft_forward, "look_at_call", None)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (1, 1) and "disabled" in layer.__dict__[CALLS].reason

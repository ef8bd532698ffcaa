"""Several adapters in a call: the library composes, each of them runs fused where its output alone is read.

Adapters that share a batch run as one call.
"""

from __future__ import annotations

import copy
import sys

import adapters
import pytest
import torch
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack
from adapters.methods import modeling
from adapters.methods.bottleneck import BottleneckLayer

import peftkern
from peftkern import settings
from peftkern.dispatch.least import BOTTLENECK
from peftkern.integrations.adapter_hub import composition

from .models import HIDDEN, LAYERS, LENGTH, adapted, batch, outcome, same

SEQ = ("double_seq_bn", "double_seq_bn[reduction_factor=4,non_linearity='gelu']", "seq_bn[reduction_factor=8]")
# Setup -> calls of adapters in each layer.
SETUPS = {
    "stack": (Stack("a", "b"), 4),
    "stack of three": (Stack("a", "c", "b"), 5),
    "batch split": (BatchSplit("a", "b", batch_sizes=[1, 2]), 4),
    "split": (Split("a", "b", splits=[4, LENGTH - 4]), 4),
    "parallel": (Parallel("a", "b"), 4),
    "average": (Average("a", "b", weights=[0.3, 0.7]), 4),
}  # fmt: skip


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def composed(setup, *configs):
    model = adapted("bert", *configs)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapters." in name:
                p.normal_(std=0.3)
    model.train_adapter(Stack(*sorted(setup.flatten())))
    model.set_active_adapters(setup)
    return model


@pytest.fixture
def together(monkeypatch):
    """How many adapters each call for a whole batch took."""
    counts, run = [], composition.multi_bottleneck_adapter

    def counting(h, bottlenecks, *args, **kwargs):
        counts.append(len(bottlenecks))
        return run(h, bottlenecks, *args, **kwargs)

    monkeypatch.setattr(composition, "multi_bottleneck_adapter", counting)
    return counts


@pytest.mark.parametrize("setup, calls", SETUPS.values(), ids=SETUPS)
def test_compositions(setup, calls):
    model = composed(setup, *SEQ)
    same(model, batch())
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (calls * LAYERS, 0)


# Setup -> adapters of each call for a whole batch, in the two places that each layer has for them.
BATCHES = {
    "two": (BatchSplit("a", "b", batch_sizes=[1, 2]), [2, 2]),
    "three": (BatchSplit("a", "d", "b", batch_sizes=1), [3, 3]),
    "one twice": (BatchSplit("a", "b", "a", batch_sizes=1), [2, 2]),
    "one without sequences": (BatchSplit("b", "a", batch_sizes=[0, 3]), [2, 2]),
    "replicated": (Parallel("a", "b"), [2, 2]),
    "of three": (Parallel("b", "d", "a"), [3, 3]),
    "in a stack": (Stack("a", BatchSplit("b", "a", batch_sizes=[2, 1])), [2, 2]),
    "of a stack": (BatchSplit("a", Stack("b", "d"), batch_sizes=[2, 1]), []),
    "of a batch": (BatchSplit("a", BatchSplit("b", "a", batch_sizes=1), batch_sizes=[1, 2]), [2, 2]),
    "in parallel": (Parallel("a", BatchSplit("b", "a", batch_sizes=[2, 1])), [2, 2]),
    "averaged": (Average("a", BatchSplit("b", "a", batch_sizes=[2, 1])), [2, 2]),
    "of tokens": (Split("a", BatchSplit("b", "a", batch_sizes=[2, 1]), splits=[4, LENGTH - 4]), [2, 2]),
}  # fmt: skip


@pytest.mark.parametrize("setup, calls", BATCHES.values(), ids=BATCHES)
def test_batches(setup, calls, together):
    """One call wherever adapters alone share a batch, and none in models that are not accelerated."""
    model, inputs = composed(setup, *SEQ, "double_seq_bn[non_linearity='tanh']"), batch()
    theirs = copy.deepcopy(model)
    same(model, inputs)
    assert together == calls * LAYERS and peftkern.status(model).stock == 0
    expected = outcome(theirs, inputs)  # while others are accelerated
    peftkern.restore(model)
    torch.testing.assert_close(outcome(model, inputs), expected, rtol=0, atol=0)
    assert together == calls * LAYERS


MIXED = {
    "residual before the norm": ("seq_bn", "seq_bn[reduction_factor=4,non_linearity='tanh']"),
    "scales": ("seq_bn[scaling='learned']", "seq_bn[scaling='channel']", "seq_bn[scaling=3.0]"),
    "Compacter": ("compacter++[reduction_factor=4]", "seq_bn", "seq_bn[non_linearity='leakyrelu']"),
    "beside": ("par_bn", "scaled_par_bn[reduction_factor=4]", "par_bn[non_linearity='swish']"),
}
APART = {
    "a gate": ("seq_bn", "seq_bn[use_gating=True]"),
    "norms": ("seq_bn[ln_before=True]", "seq_bn[ln_after=True,adapter_residual_before_ln=True]"),
    "dropout": ("seq_bn", "seq_bn[dropout=0.4]"),
}


@pytest.mark.parametrize("configs", MIXED.values(), ids=MIXED)
def test_adapters_of_several_configurations_share_a_call(configs, together):
    names = "abc"[: len(configs)]
    model = composed(BatchSplit(*names, batch_sizes=[1] * (len(names) - 1) + [4 - len(names)]), *configs)
    same(model, batch())
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (len(names) * LAYERS, 0) and together == [len(names)] * LAYERS


@pytest.mark.parametrize("make", [lambda: BatchSplit("a", "b", batch_sizes=[1, 2]), lambda: Parallel("a", "b")])
@pytest.mark.parametrize("configs", APART.values(), ids=APART)
def test_adapters_that_one_call_does_not_express_run_one_by_one(configs, make, together, shared_mask, monkeypatch):
    function = sys.modules["peftkern.autograd.residual.bottleneck_adapter"]
    monkeypatch.setattr(function, "seed_tensor", lambda seed, device: torch.tensor(shared_mask))
    model = composed(make(), *configs)
    same(model, batch())
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (2 * LAYERS, 0) and not together


def test_beside_and_in_sequence(together):
    """One is added to its input, the other to what comes later: the library's own way."""
    model = composed(BatchSplit("a", "b", batch_sizes=[1, 2]), "par_bn", "seq_bn")
    same(model, batch())
    assert not together and peftkern.status(model).fused == peftkern.status(model).stock == LAYERS


@pytest.mark.parametrize(
    "setup, configs",
    [
        (BatchSplit("a", "b", batch_sizes=[1, 3]), SEQ),
        (BatchSplit("c", "a", batch_sizes=[1, 2]), SEQ),
        (Parallel("a", "b"), ("par_bn", "par_bn")),
    ],
    ids=["another batch", "no module", "beside"],
)
def test_what_the_library_refuses(setup, configs, together):
    model, inputs, errors = composed(setup, *configs), batch(), []
    for _ in range(2):
        with pytest.raises(Exception) as error:
            model(**inputs)
        errors.append((error.type, str(error.value)))
        peftkern.accelerate(model)
    assert errors[0] == errors[1]
    model.set_active_adapters(BatchSplit("a", "b", batch_sizes=[1, 2]))
    same(model, inputs)  # nothing is left behind


def test_sizes_that_leave_sequences_out(together):
    """Sizes without an adapter: the library drops their sequences."""
    model = composed(Stack("a"), *SEQ)
    layer = model.encoder.layer[0].output
    x, states = torch.randn(3, 4, HIDDEN), []
    for _ in range(2):
        state = sys.modules[BottleneckLayer.__module__].BottleneckState(x, x, x, None)
        states.append(layer.compose(BatchSplit("a", "b", batch_sizes=[1, 1, 1]), state).hidden_states)
        peftkern.accelerate(model)
    assert states[0].shape == (2, 4, HIDDEN) and not together
    torch.testing.assert_close(states[1], states[0], rtol=1e-10, atol=0)


def test_small_batches_stay_with_the_library(together):
    model, inputs = composed(BatchSplit("a", "b", batch_sizes=[1, 2]), *SEQ), batch()
    expected = outcome(model, inputs)
    with settings.using(small_calls=False, least=((BOTTLENECK, 1 << 14),)):
        peftkern.accelerate(model)
        torch.testing.assert_close(outcome(model, inputs), expected, rtol=1e-10, atol=1e-10)
        status = peftkern.status(model, reset=True)
        assert not together and status.fused == 0 and all("too small" in r for r in status.reasons.values())
        layer = model.encoder.layer[0].output
        big = torch.randn(3, -(-(1 << 14) // (3 * HIDDEN)), HIDDEN)  # none of the adapters' shares would do
        layer.bottleneck_layer_forward(big, big, None)
    assert together == [2] and peftkern.status(model).fused == 2


@pytest.mark.parametrize("setup", [BatchSplit("a", "b", batch_sizes=[1, 2]), Parallel("a", "b")])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_single_precision(setup, autocast, together):
    """By the CPU's kernels; under autocast the dtype of every output is the library's."""
    model, inputs = composed(setup, "seq_bn", "seq_bn[reduction_factor=4,non_linearity='gelu']"), batch()
    exact, model = outcome(model, inputs), model.float()
    dtypes, errors = [], []
    for _ in range(2):
        dtypes.append([])
        hooks = [
            layer.register_forward_hook(lambda m, i, o: dtypes[-1].append(o.dtype))
            for layer in model.modules() if isinstance(layer, BottleneckLayer)
        ]  # fmt: skip
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y, grads = outcome(model, inputs, exact[0].float().cos())
        for hook in hooks:
            hook.remove()
        errors.append([(y.double() - exact[0]).norm()] + [g.isfinite().all() for g in grads.values() if g is not None])
        peftkern.accelerate(model)
    assert together == [2] * LAYERS and dtypes[0] == dtypes[1] and errors[0][1:] == errors[1][1:]
    assert errors[1][0] <= 1.5 * errors[0][0]


def test_ids_of_an_inference_mode_serve_training(together):
    model = composed(BatchSplit("a", "b", batch_sizes=[2, 1]), *SEQ)
    theirs = copy.deepcopy(model)
    peftkern.accelerate(model)
    with torch.inference_mode():
        model(**batch())
    inputs = batch()
    torch.testing.assert_close(outcome(model, inputs), outcome(theirs, inputs), rtol=1e-9, atol=1e-9)
    assert len(together) == 4 * LAYERS  # theirs took no part


@pytest.mark.parametrize("name", ["compose_single", "vslice", "pad_and_concat"])
def test_a_function_that_another_library_has_changed(name, together, monkeypatch):
    model, inputs, seen = composed(BatchSplit("a", "b", batch_sizes=[2, 1]), *SEQ), batch(), []
    expected = outcome(model, inputs)
    peftkern.accelerate(model)
    before = getattr(BottleneckLayer, name)

    def theirs(self, *args, **kwargs):
        seen.append([type(each) for each in args])
        return before(self, *args, **kwargs)

    monkeypatch.setattr(BottleneckLayer, name, theirs)
    torch.testing.assert_close(outcome(model, inputs), expected, rtol=1e-9, atol=1e-9)
    assert seen and not together and all(composition.Part not in each for each in seen)
    assert peftkern.status(model).fused == 4 * LAYERS


def test_an_adapter_that_another_library_has_changed(together, monkeypatch):
    model, inputs, seen = composed(BatchSplit("a", "b", batch_sizes=[2, 1]), *SEQ), batch(), []
    peftkern.accelerate(model)
    before = modeling.Adapter.forward
    monkeypatch.setattr(modeling.Adapter, "forward", lambda self, *a, **k: seen.append(self) or before(self, *a, **k))
    model(**inputs)
    assert len(seen) == 4 * LAYERS and not together


def test_compiled_batches(together):
    layer = composed(BatchSplit("a", "b", batch_sizes=[1, 2]), *SEQ).encoder.layer[0].output
    x, norm = torch.randn(3, 4, HIDDEN), torch.nn.LayerNorm(HIDDEN)
    expected = layer.bottleneck_layer_forward(x, x, norm)
    peftkern.accelerate(layer)
    for _ in range(2):  # the second time the layer's state has been written to
        torch._dynamo.reset()
        compiled = torch.compile(layer.bottleneck_layer_forward, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, x, norm), expected)
    assert peftkern.status(layer).stock == 0


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("setup", ["batch split", "parallel", "split", "average"])
def test_beside_one_that_is_declined(setup, which):
    model = composed(SETUPS[setup][0], *SEQ)
    for name, module in model.named_modules():
        if isinstance(module, modeling.Adapter) and name.endswith(f".{which}"):
            module.adapter_up.register_forward_hook(lambda m, i, o: None)
    report = same(model, batch())
    status = peftkern.status(model)
    assert set(report.skipped.values()) == {"up carries a hook"} and status.fused == status.stock == 2 * LAYERS


def test_fusion_reads_what_adapters_add():
    model = adapted("bert", *SEQ[:2])
    setup = Fuse("a", "b")
    model.add_adapter_fusion(setup)
    model.train_adapter_fusion(setup)
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        torch.nn.init.normal_(p, std=0.3)
    model.eval()  # its temperature changes at each call in training
    inputs = batch()
    expected = outcome(model, inputs)
    peftkern.accelerate(model)
    torch.testing.assert_close(outcome(model, inputs), expected, rtol=0, atol=0)
    status = peftkern.status(model, reset=True)
    assert status.fused == 0 and set(status.reasons.values()) == {"AdapterFusion reads what it adds"}
    model.set_active_adapters("a")
    model(**inputs)
    assert peftkern.status(model).stock == 0


@pytest.mark.parametrize("setup, fused", [(Stack("a", "b"), 0), (Stack("b", "a"), 0), (Stack("a", "c"), 2)])
def test_a_parallel_adapter_is_fused_alone(setup, fused):
    """Beside others of its layer its branch alone is read. c has no module where a has one."""
    attention = adapters.BnConfig(mh_adapter=True, output_adapter=False, reduction_factor=4, non_linearity="relu")
    model = composed(setup, "par_bn", "par_bn[reduction_factor=4]", attention)
    same(model, batch())
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (fused * LAYERS, 0 if fused else 2 * LAYERS)
    if not fused:
        assert all("not the only adapter" in reason for reason in status.reasons.values())


@pytest.mark.parametrize(
    "config, fused", [("seq_bn[use_gating=True]", LAYERS), ("par_bn[use_gating=True]", LAYERS), ("seq_bn", 0)]
)
@pytest.mark.parametrize("setup", [Stack("a"), BatchSplit("a", "b", batch_sizes=[1, 2])])
def test_gating_scores_are_told(config, fused, setup, together):
    """Of an adapter without a gate the library tells what it adds."""
    model, inputs, scores = adapted("bert", config, config, train=False), batch(), []
    model.set_active_adapters(setup)
    for _ in range(2):
        scores.append(model(**inputs, output_adapter_gating_scores=True)["adapter_gating_scores"])
        peftkern.accelerate(model)
    # With others beside it, what a parallel adapter is added to comes later: the library's own code.
    runs = fused if type(setup) is Stack or not config.startswith("par") else 0
    assert peftkern.status(model).fused == runs * len(scores[0]) and not together
    for name, layers in scores[0].items():
        for theirs, ours in zip(layers.values(), scores[1][name].values()):
            for key in theirs:
                torch.testing.assert_close(*map(torch.tensor, (ours[key], theirs[key])), rtol=1e-10, atol=0)

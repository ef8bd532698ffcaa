"""accelerate on AdapterHub's models from outside: reports, states, copies, checkpoints, releases, other libraries."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys

import adapters
import peft
import pytest
import torch
from adapters.methods import modeling
from torch import nn

import peftkern
from peftkern import settings
from peftkern.integrations import adapter_hub

from .models import HIDDEN, LAYERS, adapted, batch, outcome, trained

STOCK = {cls: cls.forward for cls in (modeling.Adapter, modeling.ParallelAdapter, modeling.NICECouplingBlock)}


@pytest.fixture(autouse=True)
def adapters_alone():
    """No patch survives a test, and frozen products are the vendor's but where a test says otherwise."""
    with settings.using(cpu_kind="vendor"):
        yield
    adapter_hub.unpatch()


def stock_again():
    """Whether the library's classes have their own functions again, once models of other tests are gone."""
    gc.collect()
    adapter_hub.unpatch()
    return {cls: cls.forward for cls in STOCK} == STOCK


def adapter_of(model):
    return next(m for m in model.modules() if isinstance(m, modeling.Adapter))


def test_report_and_status():
    model, inputs = adapted("bert", "double_seq_bn"), batch()
    adapter_of(model).adapter_up.register_forward_hook(lambda m, i, o: None)
    report = peftkern.accelerate(model)
    text = str(report).splitlines()
    assert text[0] == f"peftkern: {2 * LAYERS - 1} of {2 * LAYERS} AdapterHub layers accelerated"
    assert "  1 run AdapterHub's own code: up carries a hook" in text
    assert set(report.backends) == set(report.accelerated)
    model(**inputs)
    status = peftkern.status(model, reset=True)
    assert str(status).startswith(f"peftkern: {2 * LAYERS - 1} calls ran fused, 1 ran AdapterHub's own code")
    assert peftkern.status(model).fused == 0


def test_a_later_hook_is_warned_of_once():
    model, inputs = adapted("bert", "seq_bn", train=False), batch()
    peftkern.accelerate(model)
    for module in model.modules():
        if isinstance(module, modeling.Adapter):
            module.adapter_up.register_forward_hook(lambda m, i, o: None)
    with pytest.warns(
        RuntimeWarning, match="of type adapters.*Adapter was reported as .* AdapterHub's own code: up"
    ) as seen:
        model(**inputs)
    assert len(seen) == 1 and peftkern.status(model).stock == LAYERS


def test_state_dict_copies_pickles_and_restore():
    model, inputs = adapted("bert", "double_seq_bn_inv", train=False), batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    expected = model(**inputs)[0]
    peftkern.accelerate(model)
    assert [type(m) for m in model.modules()] == classes
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    twin = copy.deepcopy(model)
    twin(**inputs)
    assert peftkern.status(twin).fused == 2 * LAYERS + 1 and peftkern.status(model).fused == 0
    module = pickle.loads(pickle.dumps(adapter_of(model)))
    assert adapter_hub.why_not(module) is None
    peftkern.restore(twin)
    peftkern.restore(module)
    peftkern.restore(model)
    assert stock_again() and "_peftkern_calls" not in vars(adapter_of(model))
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=0, atol=0)
    assert "not accelerated" in adapter_hub.why_not(adapter_of(model))


def test_patch_takes_what_comes_later():
    adapter_hub.patch()
    model, inputs = adapted("bert", "seq_bn", train=False), batch()
    model(**inputs)
    assert peftkern.status(model, reset=True).fused == LAYERS
    peftkern.restore(model)
    model(**inputs)
    assert peftkern.status(model).fused == 0
    adapter_hub.unpatch()
    assert stock_again()


def test_active_and_inactive_adapters():
    model, inputs = adapted("bert", "seq_bn", "par_bn", train=False), batch()
    bare = copy.deepcopy(model)
    for name in "ab":
        bare.delete_adapter(name)
    peftkern.accelerate(model)
    for setup in ("a", "b", None):
        model.set_active_adapters(setup)
        expected = copy.deepcopy(model)
        peftkern.restore(expected)
        torch.testing.assert_close(model(**inputs)[0], expected(**inputs)[0])
        assert peftkern.status(model, reset=True).fused == (LAYERS if setup else 0)
    torch.testing.assert_close(model(**inputs)[0], bare(**inputs)[0], rtol=0, atol=0)
    with adapters.AdapterSetup("b"):
        model(**inputs)
    assert peftkern.status(model).fused == LAYERS


@pytest.mark.parametrize(
    "config", ["double_seq_bn_inv", "par_bn", "compacter[reduction_factor=4,shared_phm_rule=False]"]
)
def test_steps_of_training_and_a_checkpoint(config, tmp_path):
    stock = adapted("bert", config).double()
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    losses = [trained(model, torch.optim.AdamW, lr=0.01) for model in (stock, ours)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-6, atol=0)
    assert losses[0][-1] != losses[0][0] and peftkern.status(ours).stock == 0
    ours.save_adapter(str(tmp_path), "a")
    again = adapted("bert", config).double()
    again.load_state_dict({k: v for k, v in ours.state_dict().items() if ".a." not in k}, strict=False)
    again.load_adapter(str(tmp_path), load_as="b", set_active=True)
    again.double()
    inputs = batch()
    for model in (again, ours):
        model.eval()
    torch.testing.assert_close(again(**inputs)[0], ours(**inputs)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", ["1.2.0", "1.4.0", "2.0", "unknown"])
def test_other_releases_are_left_alone(version, monkeypatch):
    monkeypatch.setattr(adapters, "__version__", version)
    report = peftkern.accelerate(adapted("bert", "seq_bn"))
    reason = f"adapters {version} is outside the tested range 1.3 to 1.3"
    assert not report.accelerated and set(report.skipped.values()) == {reason}
    with pytest.warns(RuntimeWarning, match=reason):
        adapter_hub.patch()
    assert stock_again()


def test_a_class_that_another_library_has_changed(monkeypatch):
    monkeypatch.setattr(modeling.Adapter, "forward", lambda self, x, *a, **k: (x, None, None))
    report = peftkern.accelerate(adapted("bert", "seq_bn_inv"))
    assert report.accelerated == ["invertible_adapters.a"]
    assert all("Adapter.forward was replaced by" in reason for reason in report.skipped.values())


def test_a_subclass_may_compute_anything():
    class Mine(modeling.Adapter):
        pass

    module = Mine("a", HIDDEN, 4, adapters.SeqBnConfig())
    report = peftkern.accelerate(nn.ModuleDict({"a": module}))
    assert "Mine is not covered" in report.skipped["a"]


def test_beside_peft():
    """A model may hold layers of both libraries: one report, one status, one restore."""
    linear = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    both = nn.ModuleDict({"hub": adapted("bert", "seq_bn", train=False), "peft": linear})
    report = peftkern.accelerate(both)
    head = str(report).splitlines()[0]
    assert head == f"peftkern: {LAYERS} of {LAYERS} AdapterHub layers, 1 of 1 PEFT layer accelerated"
    both["hub"](**batch())
    both["peft"](torch.randn(2, 8))
    status = peftkern.status(both)
    assert str(status) == f"peftkern: {LAYERS + 1} calls ran fused, 0 ran AdapterHub's or PEFT's own code"
    peftkern.restore(both)
    both["hub"](**batch())
    assert peftkern.status(both).fused == 0 and stock_again()


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
import adapters, peftkern, torch
from transformers import BertConfig, BertModel
model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=9))
adapters.init(model)
model.add_adapter("a", config="seq_bn")
model.set_active_adapters("a")
assert [n for n in peftkern.accelerate(model).accelerated if "adapters" in n]
model.eval()(torch.ones(1, 3, dtype=torch.int64))
print(peftkern.status(model).fused, sys.modules["peft"])
"""


def test_peft_need_not_be_there():
    done = subprocess.run([sys.executable, "-c", WITHOUT_PEFT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "None"]  # a small call


def test_frozen_products_where_ours_are_faster():
    """In models of other adapters too. Elsewhere such layers are no layers of ours."""
    model, inputs = adapted("bert", "seq_bn"), batch()
    with settings.using(cpu_kind="vendor"):
        assert len(peftkern.accelerate(copy.deepcopy(model)).accelerated) == LAYERS
    with settings.using(cpu_kind="panels"):
        expected, report = outcome(model, inputs), peftkern.accelerate(model)
        assert len(report.accelerated) == (1 + 5) * LAYERS
        torch.testing.assert_close(outcome(model, inputs), expected, rtol=1e-4, atol=1e-4)
        status = peftkern.status(model, reset=True)
        assert (status.fused, status.stock) == (6 * LAYERS, 0)
        with settings.using(small_calls=False):
            model(**inputs)
        status = peftkern.status(model, reset=True)
        assert (status.fused, status.stock) == (0, 6 * LAYERS)
    with settings.using(cpu_kind="vendor"):
        model(**inputs)
    assert peftkern.status(model).fused == LAYERS
    model.freeze_model(False)
    with settings.using(cpu_kind="panels"):
        assert len(peftkern.accelerate(copy.deepcopy(model)).accelerated) == LAYERS


@pytest.mark.parametrize("part", ["an adapter", "in bf16", "a product"])
def test_compiled_modules_compute_the_same(part):
    module = modeling.Adapter("a", HIDDEN, 4, adapters.SeqBnConfig(non_linearity="gelu"))
    nn.init.normal_(module.adapter_up.weight)
    columns, arguments = HIDDEN, 2
    if part == "a product":
        module, arguments = adapted("bert", "seq_bn").encoder.layer[0].output.dense, 1
        columns = module.in_features
    x = torch.randn(2, 5, columns)
    if part == "in bf16":
        module, x = module.bfloat16(), x.bfloat16()
    with settings.using(cpu_kind="panels"):
        expected = module(*[x] * arguments)
        assert peftkern.accelerate(module).accelerated
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        found = compiled(*[x] * arguments)
    torch.testing.assert_close(*((y[0] if arguments == 2 else y) for y in (found, expected)))
    assert peftkern.status(module).fused == 0  # graphs are not counted

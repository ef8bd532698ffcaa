"""A method that is new to the package is one class and one entry: here a LoRA layer whose ranks have fixed weights."""

import dataclasses
import functools
import gc
import json

import pytest
import torch
from torch import nn

import peftkern
from peftkern.benchmarks import bench
from peftkern.integrations import hf_peft
from peftkern.methods import Held, Method, Plan, register
from peftkern.methods.linear import Branch
from peftkern.methods.look import NotCovered
from peftkern.methods.registry import unregister

pytest.importorskip("peft", reason="HF PEFT is not installed")
TINY = ["--device", "cpu", "--shape", "24,40,32", "--rank", "4", "--seconds", "0.01"]


class Weighted(nn.Module):
    """y = W x + bias + B (d * (A x)): what a library might have."""

    def __init__(self, in_features, out_features, rank=4):
        super().__init__()
        self.base_layer = nn.Linear(in_features, out_features).requires_grad_(False)
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        self.weights = nn.Parameter(torch.linspace(0.5, 2.0, rank))
        self.merged = False

    def delta(self):
        return (self.up.weight * self.weights) @ self.down.weight

    def merge(self):
        self.merged = True
        self.base_layer.weight.data += self.delta()

    def unmerge(self):
        self.merged = False
        self.base_layer.weight.data -= self.delta()

    def forward(self, x):
        y = self.base_layer(x)
        return y if self.merged else y + self.up(self.down(x) * self.weights)


def plan(look, mixed=None):
    if look.value("merged"):
        raise NotCovered("its adapter is merged")
    parts = {name: look.part(name) for name in ("base_layer", "down", "up")}
    for name, part in parts.items():
        part.require(nn.Linear, name)
    base, A, B = (part.tensor("weight", frozen=name == "base_layer") for name, part in parts.items())
    adapter = Held("weighted", WEIGHTED, (A, B, look.tensor("weights")), rank=A.shape[0])
    return Plan(base, parts["base_layer"].tensor("bias"), [adapter])


def apply(y, adapter):
    A, B, weights = adapter.tensors
    return y.add(Branch(A, B, d=weights))


def build(linear, rank, cls=Weighted):
    model = nn.Sequential(cls(linear.in_features, linear.out_features, rank))
    model[0].base_layer = linear
    return model


WEIGHTED = Method(
    name="weighted",
    taxonomy="reparameterised",
    family="L",
    layer=f"{__name__}.Weighted",
    plan=plan,
    apply=apply,
    examples=lambda K, N: {"linear": nn.Sequential(Weighted(K, N)), "higher rank": nn.Sequential(Weighted(K, N, 30))},
    build=build,
    op="lora_linear",
    coefficients=("d",),
    saves="x, and (M, R) in fp32",
    merges="W + B diag(d) A",
    tested={},
)


@pytest.fixture
def registered(request):
    gc.collect()  # models of tests before
    hf_peft.unpatch()
    method = register(getattr(request, "param", WEIGHTED))
    yield method
    gc.collect()  # models of the test
    hf_peft.unpatch()
    unregister(method)


def test_parity(registered, parity):
    parity(registered)


def test_switch_and_report(registered):
    model, x = nn.Sequential(Weighted(8, 8)), torch.randn(3, 8)
    forward = Weighted.forward
    assert hf_peft.why_not(model[0]) == "it is not accelerated: call accelerate or patch"
    assert peftkern.accelerate(model).accelerated == ["0"] and Weighted.forward is not forward
    assert peftkern.accelerate(nn.Sequential(nn.Linear(2, 2))).accelerated == []
    for _ in range(2):
        model(x)
    model[0].merge()
    model(x)
    status = peftkern.status(model)
    assert (status.fused, status.stock, status.reasons) == (2, 1, {"0": "its adapter is merged"})
    assert "not covered for weighted" in hf_peft.why_not(model[0], x, ["a", "b", "c"])
    model[0].unmerge()
    model[0].weights.data.zero_()
    torch.testing.assert_close(model(x), model[0].base_layer(x))
    peftkern.restore(model)
    assert Weighted.forward is forward


def test_patch_takes_it_too(registered):
    hf_peft.patch()
    model = nn.Sequential(Weighted(8, 8))
    model(torch.randn(3, 8))
    model(torch.randn(3, 8))
    assert peftkern.status(model).fused == 2


def test_benchmark_has_its_row(registered, tmp_path, capsys):
    assert bench.main(["--methods", "weighted", *TINY, "--json", str(tmp_path / "r.json")]) == 0
    rows = {(r["provider"], r["pass"]): r for r in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rows.keys() == {(name, which) for name in ("base", "library", "peftkern") for which in ("fwd", "fwd_bwd")}
    ours = rows["peftkern", "fwd_bwd"]
    assert (ours["method"], ours["op"], ours["R"]) == ("weighted", "lora_linear", 4) and ours["speed_up"] > 0
    lines = [line.split()[:4] for line in capsys.readouterr().out.splitlines()]
    assert lines.count(["weighted", "24x40x32", "4", "0"]) == 2


class Off(Weighted):
    """What its entry does not compute."""

    def forward(self, x):
        return super().forward(x) * 1.001


@pytest.mark.parametrize(
    "registered",
    [dataclasses.replace(WEIGHTED, layer=f"{__name__}.Off", build=functools.partial(build, cls=Off))],
    indirect=True, ids=["off"],
)  # fmt: skip
def test_benchmark_times_no_method_that_is_wrong(registered, capsys):
    assert bench.main(["--methods", "weighted", *TINY]) == 1
    assert "not measured: computes something else (y: relative error 1.0e-03" in capsys.readouterr().out


def test_an_unregistered_layer_is_nobody_s():
    assert peftkern.accelerate(nn.Sequential(Weighted(8, 8))).accelerated == []

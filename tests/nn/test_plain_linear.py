"""LoRALinear.from_linear refuses every layer that is more than x W^T + bias, by type and name."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from peftkern import LoRALinear


class Clamped(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        """Clamped."""
        return super().forward(x).clamp(-1, 1)


class Decoupled(nn.Linear):
    """Further parameters, as IDEFICS' decoupled linear has."""

    def __init__(self, *args):
        super().__init__(*args)
        self.additional_fc = nn.Linear(*args)


class Quantised(torch.Tensor):
    """Stands for the weights of torchao and quanto: a tensor subclass that decides what an addition does."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Ignores what is written to it."""
        if func is torch.Tensor.copy_:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


class Double(nn.Module):
    """A parametrization."""

    def forward(self, w):
        """Twice."""
        return 2 * w


def with_(change):
    linear = nn.Linear(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        change(linear)
    return linear


def weight(value):
    return lambda linear: linear._parameters.update(weight=value(linear.weight))


def attribute(linear):
    # As FSDP leaves it: a view in the place of a parameter.
    value = linear.weight * 1
    del linear.weight
    linear.weight = value


REFUSED = {
    "subclass": (lambda: Clamped(4, 3), r"test_plain_linear\.Clamped"),
    "more parameters": (lambda: Decoupled(4, 3), r"test_plain_linear\.Decoupled"),
    "bare subclass": (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(4, 3), "NonDynamicallyQuantizable"),
    "hook": (lambda: with_(lambda m: m.register_forward_hook(lambda *_: None)), "a hook.*lambda.*_forward_hooks"),
    "pre-hook": (lambda: with_(lambda m: m.register_forward_pre_hook(lambda *_: None)), "_forward_pre_hooks"),
    "backward hook": (lambda: with_(lambda m: m.register_full_backward_hook(print)), "_backward_hooks"),
    "weight norm, old": (lambda: with_(nn.utils.weight_norm), r"weight_norm\.WeightNorm"),
    "spectral norm, old": (lambda: with_(nn.utils.spectral_norm), r"spectral_norm\.SpectralNorm"),
    "weight norm": (lambda: with_(nn.utils.parametrizations.weight_norm), "parametrization of weight"),
    "parametrization": (lambda: with_(lambda m: parametrize.register_parametrization(m, "bias", Double())), "of bias"),
    "pruning": (lambda: with_(lambda m: prune.random_unstructured(m, "weight", 0.5)), "RandomUnstructured"),
    "instance forward": (lambda: with_(lambda m: setattr(m, "forward", torch.relu)), r"replaced by .*relu"),
    "buffer": (lambda: with_(lambda m: m.register_buffer("SCB", torch.ones(3))), "more than weight and bias: SCB"),
    "child": (lambda: with_(lambda m: m.add_module("lora", nn.Identity())), "more than weight and bias: lora"),
    "tensor subclass": (lambda: with_(weight(lambda w: nn.Parameter(w.data.as_subclass(Quantised)))), "Quantised"),
    "fp8": (lambda: with_(weight(lambda w: nn.Parameter(w.data.to(torch.float8_e4m3fn), False))), "float8_e4m3fn"),
    "sparse": (lambda: with_(weight(lambda w: nn.Parameter(w.data.to_sparse()))), "sparse"),
    "plain attribute": (lambda: with_(attribute), "no parameter of its own"),
    "bias dtype": (lambda: with_(lambda m: m._parameters.update(bias=nn.Parameter(m.bias.double()))), "bias of"),
    "no linear": (lambda: nn.Bilinear(2, 2, 2), r"expected|must be an nn.Linear, got torch\.nn\.modules\.linear\.Bilinear"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    make, words = REFUSED[kind]
    linear = make()
    trained = [p.requires_grad for p in linear.parameters()]
    with pytest.raises(TypeError, match=words):
        LoRALinear.from_linear(linear)
    assert [p.requires_grad for p in linear.parameters()] == trained, "a layer that was refused stays as it was"


def test_a_patched_class_is_refused(monkeypatch):
    linear = nn.Linear(4, 3)
    monkeypatch.setattr(nn.Linear, "forward", Clamped.forward)
    with pytest.raises(TypeError, match=r"replaced by .*Clamped\.forward"):
        LoRALinear.from_linear(linear)


def test_taken():
    plain = nn.Linear(4, 3)
    plain.note = "attributes of others do not matter"
    removed = with_(lambda m: m.register_forward_hook(print).remove())
    unparametrized = with_(nn.utils.parametrizations.weight_norm)
    parametrize.remove_parametrizations(unparametrized, "weight")
    half = nn.Linear(4, 3, dtype=torch.bfloat16)
    half.bias = nn.Parameter(half.bias.float())
    for linear in (plain, removed, unparametrized, nn.Linear(4, 3, bias=False), nn.Linear(4, 3, device="meta"), half):
        assert LoRALinear.from_linear(linear).weight is linear.weight

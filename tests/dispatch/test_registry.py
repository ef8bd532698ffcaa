"""Calls that bypass torch's dispatcher: seen by whoever listens, and as ready to change as calls that do not."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern import settings
from peftkern.dispatch import registry as dispatch
from peftkern.dispatch.watch import nobody_watches
from peftkern.testing.arguments import forward

_PARTS = ("lora_linear_fwd", "lora_linear_bwd")


def _step():
    torch.manual_seed(0)
    x, weight, A, B = torch.randn(4, 6), torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    y = peftkern.lora_linear(x, weight, A, B, scaling=0.5)
    y.square().sum().backward()
    return [y.detach(), *(t.grad for t in leaves)]


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **kwargs or {})


def test_a_dispatch_mode_sees_the_ops():
    plain = _step()
    with _Names() as mode:
        watched = _step()
    assert {f"peftkern::{part}" for part in _PARTS} <= set(mode.seen)
    assert all(map(torch.equal, plain, watched))


def test_a_profiler_sees_the_ops():
    _step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _step()
    assert {f"peftkern::{part}" for part in _PARTS} <= {event.key for event in profile.key_averages()}


def test_nobody_watches_a_plain_call():
    assert nobody_watches()
    with torch.device("cpu"):  # a function mode
        assert not nobody_watches()


def test_a_subclass_goes_through_torch():
    seen = []

    class Marked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs)

    x, weight, A, B = torch.randn(3, 6), torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    y = peftkern.lora_linear(x.as_subclass(Marked), weight, A, B)
    assert "peftkern.lora_linear_fwd.default" in seen
    assert torch.equal(y.as_subclass(torch.Tensor), peftkern.lora_linear(x, weight, A, B))


def test_what_is_remembered_has_a_bound(monkeypatch):
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")  # the CPU back end remembers calls natively
    monkeypatch.setattr(dispatch, "takers", dict.fromkeys(range(4096)))
    _step()
    assert 0 < len(dispatch.takers) < 10


def test_a_setting_acts_from_the_next_call_on(monkeypatch):
    _step()
    monkeypatch.setenv("PEFTKERN_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="PEFTKERN_BACKEND"):
        _step()
    monkeypatch.setenv("PEFTKERN_BACKEND", " Reference ")
    assert settings.current().backend == "reference"
    _step()
    with pytest.raises(RuntimeError, match="cuda"):
        monkeypatch.setenv("PEFTKERN_BACKEND", "cuda")
        _step()


def test_calls_with_gradients_outside_a_function():
    # The op itself, asked for with inputs that require grad: no graph may be recorded inside.
    A, B = torch.randn(2, 6, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    call = dispatch.caller("lora_linear_fwd")
    y, _, _ = call(*forward(torch.randn(3, 6), torch.randn(5, 6), A, B))
    assert not y.requires_grad

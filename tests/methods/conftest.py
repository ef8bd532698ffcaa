"""What an entry of the registry has to show: that its layers compute what the library's own code computes."""

from __future__ import annotations

import copy

import pytest
import torch

import peftkern
from peftkern.integrations import hf_peft
from peftkern.methods import tuner

K, N = 24, 20
# Where rounding alone decides: ulps of the largest value in fp32, where sums of another order differ by several, and in half
# precision, where all is computed in fp32 and rounded once.
_ULPS = {torch.float32: 4.0, torch.bfloat16: 0.5, torch.float16: 0.5}


def _near(errors, what):
    """Assert: the error against fp64 is at most 1.5 times the library's, or below a few ulp of the largest value.

    ``errors``: (ours, the library's, exact) of several inputs, since the errors of few numbers are left to chance.
    """
    for ours, stock, _ in errors:
        assert ours.shape == stock.shape and ours.dtype == stock.dtype, what
    ours, stock, exact = (torch.cat([t.flatten().double() for t in each]) for each in zip(*errors, strict=True))
    defined = ~exact.isnan()  # a mean over no rows is not
    assert torch.equal(ours.isnan(), ~defined), what
    ours, stock, exact = ours[defined], stock[defined], exact[defined]
    if not exact.numel():
        return
    dtype = errors[0][0].dtype
    floor = _ULPS[dtype] * exact.abs().max().item() * torch.finfo(dtype).eps / 2
    error, allowed = ((t - exact).square().mean().sqrt().item() for t in (ours, stock))
    assert error <= max(1.5 * allowed, floor), f"{what}: error {error:.3g}, the library's {allowed:.3g}"


def _step(model, x, grad_y):
    model.zero_grad()
    x = x.clone().requires_grad_(x.is_floating_point())
    y = model(x)
    with torch.autocast("cpu", enabled=False):  # as torch asks for
        y.backward(grad_y.to(y.dtype))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **({"x": x.grad} if x.is_floating_point() else {}), **gradients}


def _wide(x):
    return x.double() if x.is_floating_point() else x


def _inputs(method, model, times=1):
    """``times``: so many times the rows, where the method does not say what its inputs are."""
    if method.inputs is not None:
        return method.inputs(model, K)
    return [torch.randn(rows * times, *shape) for rows, shape in ((5, (K,)), (2, (3, K)), (2, (3, K)), (0, (K,)))]


def _takes(model, x):
    try:
        model(x)
    except RuntimeError:  # a reshape, or a Fourier transform, of no rows
        return False
    return True


def _agree(ours, stock, inputs, what):
    exact, found = copy.deepcopy(stock).double(), {}
    for x in inputs:
        if not x.numel() and not _takes(stock, x):
            assert ours(x).shape == (*x.shape[:-1], N), what
            continue
        with torch.no_grad():
            y = stock(x)
        grad_y = torch.randn(y.shape).to(y.dtype)
        answers = [_step(model, x, grad_y) for model in (ours, stock)]
        with torch.autocast("cpu", enabled=False):  # which takes what a library casts to fp32 for half precision
            answers.append(_step(exact, _wide(x), grad_y))
        assert answers[0].keys() == answers[1].keys() and len(answers[0]) > 1, f"{what}: other gradients"
        for name in answers[0]:
            found.setdefault(name, []).append([answer[name] for answer in answers])
    for name, errors in found.items():
        _near(errors, f"{what}: {name}")


@pytest.fixture
def agree():
    """(ours, the library's model, inputs, what): outputs and all gradients are near each other."""
    return _agree


def _layers(model):
    return [m for m in model.modules() if hf_peft.why_not(m) is None]


@pytest.fixture
def on_base(monkeypatch):
    """Sets the dtype of the layers that examples put adapters on. The library makes adapters in fp32 for a half base."""
    layer = tuner.layer

    def to(dtype):
        monkeypatch.setattr(tuner, "layer", lambda linear, *configs: layer(linear.to(dtype), *configs))

    return to


@pytest.fixture
def half_parity(on_base):
    """A check of one method on a base in half precision: every example, forward and all gradients, with autocast or not."""

    def check(method, dtype, autocast):
        on_base(torch.float32 if autocast else dtype)
        for case, stock in method.examples(K, N).items():
            for p in stock.parameters():  # some start at zero
                if p.requires_grad:
                    torch.nn.init.normal_(p)
            stock, ours = (copy.deepcopy(stock).train(method.trains) for _ in range(2))
            peftkern.accelerate(ours)
            inputs = [x for _ in range(8) for x in _inputs(method, stock, times=2)[:2]]
            if not autocast:
                inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
            with torch.autocast("cpu", dtype, enabled=autocast):
                try:
                    stock(inputs[0])
                except RuntimeError:  # the library's own code mixes the two dtypes that autocast gives it
                    assert autocast and ours(inputs[0]).isfinite().all()
                    continue
                _agree(ours, stock, inputs, f"{method.name}, {case}, {dtype}")
            status = peftkern.status(ours)
            assert (status.fused, status.stock) == (len(inputs), 0)

    return check


@pytest.fixture
def parity():
    """A check of one method: every example, forward and all gradients, training and evaluation, again and again, after
    merging and unmerging, and with a state dict that the library's own model has."""

    def check(method):
        assert method.examples(K, N), f"{method.name} has no example"
        for case in method.examples(K, N):
            # Copies both: hooks of the library on its tensors are not copied.
            ours, stock = (copy.deepcopy(model).train(method.trains) for model in [method.examples(K, N)[case]] * 2)
            report = peftkern.accelerate(ours)
            assert report.accelerated and not report.skipped, report
            # One class holds the forward of both: stock is the one that is not marked.
            for training in (True, False) if method.trains else (False,):
                what = f"{method.name}, {case}, {'training' if training else 'evaluation'}"
                inputs = _inputs(method, stock)
                _agree(ours.train(training), stock.train(training), inputs, what)
            assert peftkern.status(ours).stock == 0 and peftkern.status(ours).fused == (8 if method.trains else 4)
            assert peftkern.status(stock).fused == 0
            inputs = [_inputs(method, stock)[0] for _ in range(4)]
            # A state dict goes both ways.
            assert ours.state_dict().keys() == stock.state_dict().keys()
            for p in stock.parameters():
                torch.nn.init.normal_(p)
            ours.load_state_dict(stock.state_dict())
            _agree(ours, stock, inputs, f"{method.name}, {case}, loaded")
            layers = _layers(ours)
            assert layers, f"{method.name}: no layer of its type"
            both = [*layers, *(dict(stock.named_modules())[name] for name, m in ours.named_modules() if m in layers)]
            peftkern.status(ours, reset=True)
            try:
                for layer in both:
                    layer.merge()
            except (ValueError, NotImplementedError):  # what the library cannot merge
                continue
            except RuntimeError as error:
                assert "Cannot merge" in str(error)
                continue
            assert torch.equal(ours(inputs[0]), stock(inputs[0])), f"{method.name}, {case}, merged"
            for layer in both:
                layer.unmerge()
            if not any(layer.merged for layer in layers):  # as the library can
                _agree(ours, stock, inputs, f"{method.name}, {case}, unmerged")
                assert peftkern.status(ours).stock == 1, "runs the library's own code beyond the merged call"

    return check

"""torch.jit.trace of layers, grad mode on: what is recorded, that it trains, and where it runs."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

from peftkern import LoRALinear, dora_linear, lora_linear, multi_lora_linear, quantize, sgmv

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def traced(function, *args, warn="error", **options):
    """The trace, saved and loaded again. Constants that were frozen into it are errors, unless ``warn`` says otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter(warn, torch.jit.TracerWarning)
        trace = torch.jit.trace(function, args, **options)
    file = io.BytesIO()
    torch.jit.save(trace, file)
    file.seek(0)
    return torch.jit.load(file)


def layer(**options):
    made = LoRALinear(10, 6, r=3, **options)
    nn.init.normal_(made.lora_B)
    return made


@pytest.mark.parametrize("options", [{}, dict(bias=False), dict(train_bias=True), dict(lora_dropout=0.5)], ids=str)
def test_a_layer_runs_and_trains_without_peftkern(options):
    made = layer(**options, dtype=torch.float64).eval()
    trace = traced(made, torch.randn(4, 10, dtype=torch.float64))
    assert "peftkern::" not in str(trace.inlined_graph)
    x = torch.randn(2, 7, 10, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(trace(x), made(x))
    trace(x).square().sum().backward()
    copies = dict(trace.named_parameters())
    made(x.detach()).square().sum().backward()
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(copies[name].grad, parameter.grad)


def test_a_merged_layer():
    made = layer().eval()
    made.merge()
    x = torch.randn(3, 10)
    torch.testing.assert_close(traced(made, torch.randn(4, 10))(x), made(x))


def test_dropout_stays_random():
    made = layer(lora_dropout=0.5)
    nn.init.zeros_(made.weight)
    trace = traced(made, torch.randn(4, 10), check_trace=False)
    x = torch.ones(2000, 10)
    first, second = trace(x), trace(x)
    assert not torch.equal(first, second)
    # The mean over rows is the undropped value; with p = 1/2 a row's variance is the sum of the squared terms.
    expected, error = made.eval()(x)[0], (made.get_delta_weight().square().sum(1) / len(x)).sqrt()
    assert bool(((first.mean(0) - expected).abs() < 5.0 * error).all()) and bool(
        (error < 0.1 * expected.abs().max()).all()
    )


def test_what_dora_adds_drops_what_its_branch_drops():
    made = layer(use_dora=True, lora_dropout=0.5)
    nn.init.uniform_(made.lora_magnitude, 0.5, 2.0)
    trace = traced(made, torch.randn(4, 10), check_trace=False)
    y = trace(torch.ones(4000, 10))
    # One mask for all of what the adapter adds: with p = 1/2 the variance is the sum of its squared terms.
    total = made.weight + made.get_delta_weight()
    adds = total * (made.lora_magnitude / total.norm(dim=1))[:, None] - made.weight
    torch.testing.assert_close(y.var(0), adds.square().sum(1), rtol=0.15, atol=0.0)


@pytest.mark.parametrize("dtype, adapter_dtype", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=str)
def test_scale_vectors(dtype, adapter_dtype):
    g = torch.Generator().manual_seed(0)

    def normal(*size, dtype=dtype):
        return torch.randn(*size, generator=g).to(dtype)

    W, A, B = normal(6, 10), normal(3, 10, dtype=adapter_dtype), normal(6, 3, dtype=adapter_dtype)
    sizes = dict(rank_scale=3, base_in_scale=10, delta_in_scale=10, base_out_scale=6, delta_out_scale=6, bias=6)
    vectors = {name: normal(size) for name, size in sizes.items()}

    def call(x, scaling):
        return lora_linear(x, W, A, B, scaling=scaling, **vectors)

    trace = traced(call, normal(4, 10), torch.tensor(0.5), check_trace=dtype == torch.float32)
    x, scaling = normal(2, 3, 10), torch.tensor(0.25)
    y, recorded = call(x, scaling), trace(x, scaling)
    assert recorded.dtype == y.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(recorded, y, rtol=1e-5, atol=1e-5)
        return
    # Half an ulp each: the trace rounds x * p_b, the base product and what g_b makes of it, relative to a sum of absolute
    # values, and then y, as ours does too. All that has adapters in it is in fp32. A hundredth for errors of errors.
    p_b, g_b = vectors["base_in_scale"].float(), vectors["base_out_scale"].float()
    terms = torch.nn.functional.linear((x.float() * p_b).abs(), W.float().abs()) * g_b.abs()
    bound = 1.01 * torch.finfo(dtype).eps / 2 * (3 * terms + 2 * y.float().abs())
    assert ((recorded.float() - y.float()).abs() <= bound).all()


class Many(nn.Module):
    """A layer with two adapters."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight = nn.Parameter(torch.randn(6, 10), requires_grad=False)
        self.A = nn.ParameterList([torch.randn(3, 10), torch.randn(5, 10)])
        self.B = nn.ParameterList([torch.randn(6, 3), torch.randn(6, 5)])

    def forward(self, x, ids):
        """Of each row, its adapter."""
        adapters = [(a, b, 0.5) for a, b in zip(self.A, self.B, strict=True)]
        return multi_lora_linear(x, self.weight, adapters, ids) if self.base else sgmv(x, adapters, ids)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("base", [True, False], ids=["multi_lora_linear", "sgmv"])
def test_a_mixed_batch_takes_the_ids_it_is_given(base):
    made, x, ids = Many(base), torch.randn(4, 10), torch.tensor([0, 1, -1, 1])
    made(x, ids)  # its route is known now, and must not become a constant of the trace
    trace = torch.jit.trace(made, (x, ids), check_trace=False)
    for other in ([1, 0, 0, -1], [-1, -1, -1, -1]):
        other = torch.tensor(other)
        assert torch.equal(trace(x, other), made(x, other))


KINDS = ["nf4", "nf4 nested", "fp4", "int8", "int4", "fp8", "mxfp4"]


def _codes(kind, N=32, K=64):
    return quantize(torch.randn(N, K), kind.split()[0], nested="nested" in kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_codes(kind):
    base, A, B = _codes(kind), torch.randn(4, 64), torch.randn(32, 4)
    x = torch.randn(5, 64)
    for call in (lambda x: lora_linear(x, base, A, B), LoRALinear.from_linear(base, r=4)):
        trace = traced(call, torch.randn(3, 64), warn="ignore")  # codes and their table are constants
        torch.testing.assert_close(trace(x), call(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N, K", [(64, 32), (16, 64), (64, 64)])
def test_a_base_in_codes_of_another_shape_is_refused(kind, N, K):
    base, A, B = _codes(kind), torch.randn(4, K), torch.randn(N, 4)
    for call in (lambda x: lora_linear(x, base, A, B), lambda x: dora_linear(x, base, A, B, torch.ones(N))):
        with pytest.raises(ValueError, match=r"of kind|expected|lora_A"):
            torch.jit.trace(call, torch.randn(3, K))


@pytest.mark.parametrize("name, shape", [("lora_B", (1, 4)), ("lora_A", (1, 10)), ("bias", (1,)), ("base_out_scale", (1,)),
                                         ("rank_scale", (1,)), ("delta_in_scale", (1,))])  # fmt: skip
def test_nothing_is_broadcast(name, shape):
    given = {"weight": torch.randn(6, 10), "lora_A": torch.randn(4, 10), "lora_B": torch.randn(6, 4)}
    given[name] = torch.randn(shape)
    for run in (lambda f, x: f(x), torch.jit.trace):
        with pytest.raises(ValueError, match="lora_A|lora_B" if name.startswith("lora") else name):
            run(lambda x: lora_linear(x, **given), torch.randn(3, 10))

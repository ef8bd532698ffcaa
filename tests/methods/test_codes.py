"""The functional forms on a weight in codes: as on the weight that the codes say, or refused."""

import pytest
import torch

import peftkern
from peftkern.bases.base import Base
from peftkern.methods import METHODS
from peftkern.testing.bases import dequantised

from .test_functions import DROPS, FORMS, K, N, case_of, function_of

TAKES = [name for name in FORMS if not METHODS[name].dense]
KINDS = ["int8", "nf4"]


def _results(name, weight, x, b, tensors, **options):
    inputs = [t for t in (x, b, *tensors) if t.requires_grad]
    y = function_of(name)(x, weight, *tensors, bias=b, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TAKES)
def test_as_the_weight_that_the_codes_say(name, kind, dtype):
    _, x, W, b, tensors = case_of(name, dtype)
    base = peftkern.quantize(W, kind)
    W, tolerance = dequantised(base, N, K).to(dtype), 1e-9 if dtype == torch.float64 else 2e-5
    for options in [{}] + [{"dropout_p": 0.4, "training": True, "seed": 5}] * (name in DROPS):
        found, expected = (_results(name, w, x, b, tensors, **options) for w in (base, W))
        for got, want in zip(found, expected, strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(1, want.abs().max().item()))


@pytest.mark.parametrize("name", [name for name in FORMS if name not in TAKES])
def test_what_reads_elements_refuses_codes(name):
    _, x, W, b, tensors = case_of(name)
    with pytest.raises(TypeError, match="base of kind int8, but this method reads its elements"):
        function_of(name)(x, peftkern.quantize(W, "int8"), *tensors, bias=b)


@pytest.mark.parametrize("name", TAKES)
def test_bad_input_is_named(name):
    _, x, W, b, tensors = case_of(name)
    base = peftkern.quantize(W, "int8")
    with pytest.raises(ValueError, match="x has shape"):
        function_of(name)(x[:, :-1], base, *tensors, bias=b)
    with pytest.raises(ValueError, match="bias"):
        function_of(name)(x, base, *tensors, bias=b[:-1])
    with pytest.raises(ValueError, match="base of kind int8 without a shape"):
        function_of(name)(x, Base("int8", base.tensors), *tensors, bias=b)
    if tensors[0].dim() == 2 and name not in ("MiSS", "VeRA"):
        with pytest.raises(ValueError, match="has shape"):
            function_of(name)(x, base, tensors[0][:, :-1], *tensors[1:], bias=b)

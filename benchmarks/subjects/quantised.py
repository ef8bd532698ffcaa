"""LoRA over a weight in 4 or 8 bits: HF PEFT on a layer of bitsandbytes, and an accelerated copy of it.

Beside both: the frozen dense layer, and LoRA of ours over that. The library computes in the dtype of x. W8A8 is int8 whose
products are of integers in ours alone: beside it stands ours over int8 too.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from peftkern.bases.base import base_of, kind_of
from peftkern.methods import METHODS

from ..core.case import Case, Floor
from ..layers import Layer
from ..peers.candidates import NOT_HERE
from ..peers.data import frozen_linear
from .layer import LayerSubject
from .subject import installed

LIBRARY = "bitsandbytes"
KINDS = {"NF4": "nf4", "NF4, nested": "nf4", "FP4": "fp4", "int8": "int8", "W8A8": "int8"}
# Bytes of an element of W: its code, and what a group of 64 shares, fp32, or a byte and an fp32 for each 256 of these. (Rows
# of 8 bits share one scale.)
BYTES = {
    "NF4": 1 / 2 + 4 / 64,
    "NF4, nested": 1 / 2 + 1 / 64 + 4 / (64 * 256),
    "FP4": 1 / 2 + 4 / 64,
    "int8": 1.0,
    "W8A8": 1.0,
}
# Relative errors of y and dx where what meets the weight is rounded to 8 bits (peftkern/bases/int8.py): less is another product.
ROUNDED = (0.003, 0.011)
ROWS, SIZES = (1, 4, 16, 512, 2048), ((4096, 4096), (2304, 2816))


def not_here() -> str | None:
    """Why the library's layers cannot be made, or None."""
    return None if installed(LIBRARY) else f"{NOT_HERE}{LIBRARY} is not installed (make quantised-env)"


def in_codes(linear: nn.Linear, form: str) -> nn.Module:
    """bitsandbytes' layer of the weight of a linear layer without bias, frozen."""
    import bitsandbytes as bnb

    (N, K), dtype, kind = linear.weight.shape, linear.weight.dtype, KINDS[form]
    weight, frozen = linear.weight.detach().clone(), dict(requires_grad=False)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, **frozen)
    else:
        options = dict(compress_statistics=form.endswith("nested"), quant_type=kind)
        layer = bnb.nn.Linear4bit(K, N, False, dtype, **options)
        layer.weight = bnb.nn.Params4bit(weight, **options, **frozen)
    return layer.to(linear.weight.device).requires_grad_(False)


def exact(model: nn.Module) -> nn.Module:
    """A copy of PEFT's model in fp64, over dense layers of what the codes stand for."""
    wide = copy.deepcopy(model)
    for module in wide.modules():
        if hasattr(module, "base_layer"):
            base = base_of(module.base_layer)
            weight = kind_of(base.kind).dequantise(
                base.tensors, torch.float64, (module.out_features, module.in_features)
            )
            module.base_layer = frozen_linear(weight)
    return wide.double()


class Codes(Layer):
    """A linear layer, whose adapters are put on what bitsandbytes makes of it."""

    shapes = tuple((M, K, N) for K, N in SIZES for M in ROWS)
    # Of 8 bits the first call of a layer takes the scales from the weight.
    drops = shared = False

    def __init__(self, form: str):
        self.form, self.compute = form, "int8" if form == "W8A8" else None

    def adapted(self, *weights: Tensor) -> nn.Module:
        return in_codes(self.frozen(*weights), self.form)

    def exact(self, model: nn.Module) -> nn.Module:
        return exact(model)

    def floor(self, case: Case, which: str) -> Floor:
        """Of a layer in codes, which are what every pass has to read of W."""
        dense, passes = super().floor(case, which), 1 if which == "fwd" else 2
        spared = passes * case.K * case.N * (case.dtype.itemsize - BYTES[self.form])
        return dataclasses.replace(dense, base_bytes=dense.base_bytes - spared)


class QuantisedSubject(LayerSubject):
    """LoRA's layer over a kind of codes.

    ``others``: what of ours is timed too, by the end of the provider's name. ``bounds``: of results that do not equal the
    library's to rounding (peers/check.py).
    """

    beside = LIBRARY

    @property
    def others(self) -> dict[str, LayerSubject]:
        weight_only = {"int8": QuantisedSubject(METHODS["LoRA"], Codes("int8"))} if self.layer.compute else {}
        return weight_only | {"dense": LayerSubject(METHODS["LoRA"], Layer())}

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        return dict.fromkeys(("y", "dx"), ROUNDED) if self.layer.compute else {}

    @property
    def name(self) -> str:
        return f"LoRA over {self.layer.form}"

    def missing(self) -> str | None:
        return not_here()


def subjects(form: str) -> list[QuantisedSubject]:
    """The one of that kind of base."""
    return [QuantisedSubject(METHODS["LoRA"], Codes(form))]

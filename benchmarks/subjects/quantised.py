"""LoRA over a weight in 4 or 8 bits: HF PEFT on a layer of bitsandbytes, and an accelerated copy of it.

Beside both: the frozen dense layer, and LoRA of ours over that. The library computes in the dtype of x.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftkern.bases.base import base_of, kind_of
from peftkern.methods import METHODS

from ..core.case import Case
from ..core.presets import Choice, Entry
from ..layers import Layer
from ..peers.candidates import NOT_HERE
from .layer import LayerSubject
from .subject import Pair, accelerated, installed, trained

KINDS = {"NF4": "nf4", "NF4, nested": "nf4", "FP4": "fp4", "int8": "int8"}
DENSE = LayerSubject(METHODS["LoRA"], Layer())
ROWS, SIZES = (1, 4, 16, 512, 2048), ((4096, 4096), (2304, 2816))


class QuantisedSubject(NamedTuple):
    """A kind of base, of LoRA's layer."""

    form: str

    on_layer = True
    op = DENSE.op
    beside = "bitsandbytes"
    layer = DENSE.layer
    dense = DENSE

    @property
    def name(self) -> str:
        return f"LoRA over {self.form}"

    def entries(self) -> tuple[Entry, ...]:
        return tuple(Entry(M, K, N, R=(16,), adapter_dtypes=("fp32",)) for K, N in SIZES for M in ROWS)

    def choice(self, asked: Choice) -> Choice:
        return dataclasses.replace(DENSE.choice(asked), dropouts=None)

    def missing(self) -> str | None:
        return None if installed(self.beside) else f"{NOT_HERE}{self.beside} is not installed (make quantised-env)"

    def small(self, case: Case) -> Case:
        return DENSE.small(case)

    def pair(self, case: Case, weights: tuple[Tensor, ...]) -> Pair:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stock = DENSE.method.build(self._frozen(case, *weights), case.R).to(case.device).train()
            for p in trained(stock):
                nn.init.normal_(p, std=0.1)
        # Of 8 bits the first call of a layer takes the scales from the weight.
        ours, (name,) = accelerated(stock, shares=False)

        def exact():
            base = base_of(stock.get_submodule(name).base_layer)
            weight = kind_of(base.kind).dequantise(base.tensors, torch.float64, (case.N, case.K))
            wide = DENSE.method.build(DENSE.layer.frozen(weight), case.R).double().train()
            for to, p in zip(trained(wide), trained(stock), strict=True):
                to.data.copy_(p)
            return wide.get_submodule(name), trained(wide)

        models = stock, ours
        return Pair(
            tuple(model.get_submodule(name) for model in models), tuple(map(trained, models)),
            [t for model in models for t in (*model.parameters(), *model.buffers())], exact,
        )  # fmt: skip

    def _frozen(self, case: Case, weight: Tensor) -> nn.Module:
        import bitsandbytes as bnb

        N, K = weight.shape
        if KINDS[self.form] == "int8":
            layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
        else:
            nested = self.form.endswith("nested")
            kind = KINDS[self.form]
            layer = bnb.nn.Linear4bit(K, N, False, case.dtype, compress_statistics=nested, quant_type=kind)
            layer.weight = bnb.nn.Params4bit(
                weight.detach().clone(), requires_grad=False, compress_statistics=nested, quant_type=kind
            )
        return layer.to(case.device).requires_grad_(False)


def subjects(form: str) -> list[QuantisedSubject]:
    """The one of that kind of base."""
    return [QuantisedSubject(form)]

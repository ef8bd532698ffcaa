"""A step of QLoRA in a whole model: a Llama whose linear layers are of bitsandbytes, with HF PEFT's LoRA on each, and an
accelerated copy of it, beside the step of the frozen dense model. The library computes in the dtype of x."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import Tensor, nn

from peftkern.methods import METHODS

from ..core.case import Case
from ..core.presets import Choice, Entry
from . import quantised
from .model import Model
from .subject import Pair, accelerated, randomised

TIMED = ("NF4",)
ROWS, HIDDEN = 512, 576
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _llama(K: int) -> nn.Module:
    import transformers

    size = max(1, K // 64)
    config = transformers.LlamaConfig(
        vocab_size=1, hidden_size=K, num_hidden_layers=size, num_attention_heads=size, intermediate_size=8 * K // 3,
        use_cache=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return transformers.LlamaModel(config).requires_grad_(False).train()


class LlamaSubject(NamedTuple):
    """A kind of codes."""

    form: str

    on_layer = False
    op = METHODS["LoRA"].op
    beside = quantised.LIBRARY
    layer = Model(_llama)

    @property
    def name(self) -> str:
        return f"LoRA over {self.form} in Llama"

    def entries(self) -> tuple[Entry, ...]:
        return (Entry(ROWS, HIDDEN, HIDDEN, adapter_dtypes=("fp32",)),)

    def choice(self, asked: Choice) -> Choice:
        return dataclasses.replace(asked, dtypes=asked.dtypes or ("fp32",), dropouts=None, adapters=("fp32",))

    def missing(self) -> str | None:
        return quantised.not_here()

    def small(self, case: Case) -> Case:
        """Rows of whole blocks: of others the library multiplies another weight on CPUs."""
        return dataclasses.replace(case, M=48, K=192, N=192, R=min(case.R, 16))

    def pair(self, case: Case, weights: tuple[Tensor, ...]) -> Pair:
        import peft

        stock = self.layer.frozen(*weights)
        linear = [name for name, module in stock.named_modules() if isinstance(module, nn.Linear)]
        for name in linear:
            stock.set_submodule(name, quantised.in_codes(stock.get_submodule(name), self.form))
        stock = peft.get_peft_model(stock, peft.LoraConfig(r=case.R, lora_alpha=2 * case.R, target_modules=TARGETS))
        stock = randomised(stock.to(case.device), 0.02).train()
        return self.layer.pair(stock, accelerated(stock, shares=False)[0], lambda: quantised.exact(stock))


def subjects(form: str) -> list[LlamaSubject]:
    """The one of that kind of codes."""
    return [LlamaSubject(form)]

"""Hugging Face PEFT as a peer: its LoRA layer as users train it, and its batch of several adapters."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..core.case import Case, Step
from .data import SCALING, Data, frozen_linear
from .many_data import MultiData


def missing() -> str | None:
    """Why it cannot run, or None."""
    return None if importlib.util.find_spec("peft") else "peft is not installed (pip install 'peftkern[bench]')"


def one(case: Case, data: Data, prepare: Callable[[nn.Module], Callable] = lambda layer: layer) -> Step:
    """PEFT's layer in training. ``prepare`` makes what is called of it."""
    layers, leaves = _layers(case, data, autocast=case.adapter_dtype != case.dtype)
    calls = [prepare(layer) for layer in layers]
    frozen = [*data.weight, *(t for part in leaves for t in part[1:])]
    return Step(lambda i: calls[i](data.x[i]), leaves, data.dy, frozen)


def compiled(case: Case, data: Data) -> Step:
    """The same under torch.compile."""
    # Each case starts from an empty cache: torch gives up compiling a function after eight variants.
    torch._dynamo.reset()
    return one(case, data, lambda layer: torch.compile(layer, dynamic=False))


def _layers(case: Case, data: Data, *, autocast: bool) -> tuple[list[nn.Module], list[list[Tensor]]]:
    import peft

    config = peft.LoraConfig(
        r=case.R, lora_alpha=SCALING * case.R, lora_dropout=case.dropout, target_modules=["0"], bias="none"
    )
    layers, leaves = [], []
    for weight, x in zip(data.weight, data.x):
        wrapped = nn.Sequential(frozen_linear(weight))
        wrapped.config = None  # PEFT looks for a transformers config
        model = peft.get_peft_model(wrapped, config, autocast_adapter_dtype=autocast)
        layer = model.base_model.model[0].train()
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            for mine, theirs in zip(data.adapters(case.R, case.adapter_dtype), (A, B)):
                theirs.copy_(mine)
        assert A.dtype == B.dtype == case.adapter_dtype, (A.dtype, case.adapter_dtype)
        layers.append(layer)
        leaves.append([x, A, B])
    return layers, leaves


class ManyLayer:
    """HF PEFT's LoRA layer over each of the frozen weights, with ``adapter_names`` for the rows; forward only, since
    PEFT raises in training. The layer holds our tensors themselves: 256 adapters of all copies at most."""

    def __init__(self, data: MultiData, dtype: torch.dtype):
        import peft
        from peft.tuners.lora.layer import Linear

        case = data.case
        self.sets = max(1, min(data.copies, 256 // case.adapters))
        config = peft.LoraConfig(r=case.R, lora_alpha=case.R, target_modules=["0"], init_lora_weights=False)
        self.layers = []
        for w, weight in enumerate(data.weight):
            layer = Linear(frozen_linear(weight), "unused", config, r=1, lora_alpha=1)
            for i in range(w, self.sets, len(data.weight)):
                for a, (A, B, s) in enumerate(data.lists(dtype)[i]):
                    layer.update_layer(f"{i}_{a}", A.shape[0], s * A.shape[0], config)
                    layer.lora_A[f"{i}_{a}"].weight = nn.Parameter(A.detach())
                    layer.lora_B[f"{i}_{a}"].weight = nn.Parameter(B.detach())
            self.layers.append(layer.eval())
        ids = data.ids.tolist()
        self.names = [["__base__" if a < 0 else f"{i}_{a}" for a in ids] for i in range(self.sets)]

    def forward(self, x: Tensor, i: int) -> Tensor:
        """y (M, N) of x (M, K) with the weight and the set of copy ``i``."""
        i %= self.sets
        return self.layers[i % len(self.layers)](x, adapter_names=self.names[i])

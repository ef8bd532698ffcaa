"""LoRALinear on a weight in codes: of a layer that a library has quantised, or of a base."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..autograd.row_norm import row_norm
from ..autograd.shapes import uncast
from ..bases.base import Base, kind_of
from ..methods import quantised
from ..methods.look import NotCovered
from ..methods.quantised import Frozen
from .lora import LoRALinear

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Codes(nn.Module):
    """A base as a module: its tensors are buffers, which move from device to device and keep their dtypes.

    Args:
        base: with its shape (N, K). Its tensors are shared. Raises TypeError or ValueError for one that does not fit its kind.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        if base.shape is None:
            raise ValueError(f"the base of kind {base.kind} has no shape, which a layer needs")
        (self.out_features, self.in_features), self.kind = base.shape, base.kind
        kind_of(base.kind).check(base.tensors, torch.empty(0, device=base.device), self.in_features, self.out_features)
        for i, t in enumerate(base.tensors):
            self.register_buffer(f"weight_{i}" if i else "weight", t)
        self.bias = None

    def frozen(self) -> Frozen:
        """The base as it is now."""
        return Frozen(Base(self.kind, tuple(self._buffers.values()), (self.out_features, self.in_features)), None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codes:
        for name, t in self._buffers.items():
            moved = fn(t)
            self._buffers[name] = moved if moved.dtype == t.dtype else t.to(moved.device)
        return self


def layer_of(weight: nn.Module | Base) -> nn.Module:
    """A base as a layer, a layer as it is."""
    return Codes(weight) if isinstance(weight, Base) else weight


class LoRALinearOnCodes(LoRALinear):
    """What ``LoRALinear.from_linear`` makes of a quantised layer, which it holds as ``base_layer`` and reads at each call.

    Keys of the state dict are the layer's own. ``merge`` is refused.
    """

    def _build(self, *args) -> None:
        super()._build(*args)
        self.register_state_dict_post_hook(_own_keys)
        self.register_load_state_dict_pre_hook(_layers_keys)

    @staticmethod
    def _lora_dtypes(base: nn.Module) -> list[torch.dtype]:
        return list(_DTYPES)

    def _hold(self, base: nn.Module, train_bias: bool) -> torch.device:
        self.base_layer = base.requires_grad_(False)
        if isinstance(base.bias, nn.Parameter):
            base.bias.requires_grad_(train_bias)
        elif train_bias:
            raise TypeError("train_bias: the bias of this layer is no parameter")
        return self._frozen().weight.device

    @property
    def weight(self) -> Tensor:
        """The library's, in its class: of HQQ the codes."""
        return self.base_layer.weight if hasattr(self.base_layer, "weight") else self.base_layer.W_q

    @property
    def bias(self) -> Tensor | None:
        """The layer's."""
        return self.base_layer.bias

    def _frozen(self) -> Frozen:
        if isinstance(self.base_layer, Codes):
            return self.base_layer.frozen()
        try:
            return quantised.now(self.base_layer) or Frozen(self.base_layer.weight, self.base_layer.bias)
        except NotCovered as refused:
            raise RuntimeError(f"the quantised layer cannot be read: {refused}") from None

    def _reset_magnitude(self) -> None:
        if self.use_dora:
            with torch.no_grad():
                self.lora_magnitude.copy_(row_norm(self._frozen().weight, self.lora_A, self.lora_B, self.scaling))

    def merge(self) -> NoReturn:
        """RuntimeError: the sum would have to be rounded to codes anew, and unmerged another time."""
        raise RuntimeError(
            "merge: the weight is in codes, and its sum with the branch would be rounded to codes anew: dequantise the "
            "layer before, or keep the branch"
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight, bias, uncasts = self._frozen()
        if not isinstance(self.bias, nn.Parameter):  # HQQ has computed it from one
            bias = None if bias is None else bias.detach()
        if uncasts:  # as the library's layer, which has the dtype of x under autocast too
            with uncast(x):
                return self._adapted(x, weight, bias, self.lora_magnitude)
        return self._adapted(x, weight, bias, self.lora_magnitude)


def _own_keys(module: LoRALinearOnCodes, state: dict, prefix: str, local_metadata: dict) -> None:
    for key in [key for key in state if key.startswith(prefix + "base_layer.")]:
        state[prefix + key.removeprefix(prefix + "base_layer.")] = state.pop(key)


def _layers_keys(module: LoRALinearOnCodes, state: dict, prefix: str, *args) -> None:
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(prefix + "lora_")]:
        state[prefix + "base_layer." + key.removeprefix(prefix)] = state.pop(key)

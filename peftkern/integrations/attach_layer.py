"""One layer with attached adapters: its forward, and the requests in force in the calling context."""

from __future__ import annotations

import types
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapter_bank import AdapterBank
from ..autograd.multi_lora_linear import multi_lora_linear, sgmv

_PLAIN = (Tensor, nn.Parameter)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Entry:
    """An adapter of a model: its id in the bank of every layer that it changes.

    ``users`` requests run with it; once ``removed``, the last of them frees it.
    """

    def __init__(self, key: str):
        self.key = key  # its name in the banks: no two entries ever share one
        self.ids: dict[AttachedLinear, int] = {}
        self.users = 0
        self.removed = False


class Request:
    """The adapters of one batch. They stay as they are until the request ends, whatever is added or removed."""

    def __init__(self, names: tuple[str | None, ...], entries: dict[str, Entry]):
        self.names, self.entries = names, entries
        self._of_layer: dict[tuple, Tensor | None] = {}
        self._shared: dict[tuple, Tensor] = {}

    def ids(self, layer: AttachedLinear, x: Tensor) -> Tensor | None:
        """int32, one id per leading index of x, or None if none of them has an adapter here.

        Beams, and sequences returned per prompt, come as copies one after the other: so do the names.
        """
        rows, given = x.shape[0] if x.dim() else 1, len(self.names)
        copies = rows // given if given else 0
        if x.dim() < 2 or rows != copies * given or (copies > 1 and x.dim() == 2):
            raise ValueError(f"use() names {given} sequences, but {layer.name} gets an input of shape {tuple(x.shape)}")
        key = layer, copies, x.device
        if key not in self._of_layer:
            self._of_layer[key] = self._make(layer, copies, x.device)
        return self._of_layer[key]

    def _make(self, layer: AttachedLinear, copies: int, device: torch.device) -> Tensor | None:
        each = [-1 if name is None else self.entries[name].ids.get(layer, -1) for name in self.names]
        if not copies or max(each) < 0:
            return None
        # Layers whose banks agree share the tensor: it carries the route of the batch.
        key = tuple(each), copies, device, layer.bank.snapshot().slots
        if key not in self._shared:
            with torch.inference_mode(False):
                ids = torch.tensor(each, dtype=torch.int32, device=device)
                self._shared[key] = ids.repeat_interleave(copies) if copies > 1 else ids
        return self._shared[key]


# MultiLoRA -> its request. One variable for all: those made at run time would never be freed.
requests: ContextVar[Mapping[Any, Request]] = ContextVar("peftkern_requests", default=types.MappingProxyType({}))


def layer_reason(layer: nn.Module) -> str | None:
    """Why this layer can carry no attached adapters, or None."""
    forward = layer.__dict__.get(forward_attribute(layer))
    if isinstance(forward, AttachedLinear):
        return "has adapters attached already: add to those"
    cls = type(layer)
    if cls is not nn.Linear and cls is not Conv1D:
        return f"is a {cls.__module__}.{cls.__qualname__}, expected torch.nn.Linear or transformers' Conv1D"
    # accelerate's hooks, while there and once removed, leave the class's own method on the layer, as copies do.
    if forward is not None and forward != types.MethodType(cls.forward, layer):
        return "has a forward that was replaced"
    weight = layer.weight
    if type(weight) not in _PLAIN or weight.layout is not torch.strided or weight.dtype not in _FLOATS:
        return f"has a weight that is a {weight.dtype} {type(weight).__name__}"
    if device_of(layer).type == "meta":
        return "has no weight yet (device meta)"
    return None


def forward_attribute(layer: nn.Module) -> str:
    """Where a layer's own forward is to be replaced: accelerate's hooks wrap the one that they keep beside them."""
    wrapper = layer.__dict__.get("forward")
    hooked = getattr(getattr(wrapper, "func", None), "__module__", None) == "accelerate.hooks"
    return "_old_forward" if hooked and "_old_forward" in layer.__dict__ else "forward"


def put_forward(layer: nn.Module, attached: AttachedLinear) -> None:
    """Make ``attached`` what a call of the layer runs, inside of accelerate's hook if there is one."""
    setattr(layer, forward_attribute(layer), attached)


def drop_forward(layer: nn.Module, attached: AttachedLinear) -> None:
    """Undo ``put_forward``, wherever a hook that came or went since has left ``attached``."""
    if layer.__dict__.get("_old_forward") is attached:
        layer._old_forward = types.MethodType(type(layer).forward, layer)
    if layer.__dict__.get("forward") is attached:
        del layer.forward


def device_of(layer: nn.Module) -> torch.device:
    """Where the layer computes: its weight's device, or the one to which accelerate brings an offloaded weight."""
    hook = layer.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and getattr(one, "execution_device", None) is not None:
            return torch.device(one.execution_device)
    return layer.weight.device


def features(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a covered layer."""
    N, K = layer.weight.shape
    return (N, K) if type(layer) is Conv1D else (K, N)


class AttachedLinear:
    """What takes the place of a layer's ``forward``: the base model's outside of ``use``, else all adapters at once.

    A copy or a pickle of the layer is a plain layer again.
    """

    def __init__(self, owner, name: str, layer: nn.Module, bank: AdapterBank):
        self.owner, self.name, self.layer, self.bank = owner, name, layer, bank

    def __call__(self, *args, **kwargs) -> Tensor:
        layer = self.layer
        request = requests.get().get(self.owner)
        if request is None or len(args) + len(kwargs) != 1:
            return type(layer).forward(layer, *args, **kwargs)
        (x,) = args or kwargs.values()
        ids = request.ids(self, x)
        if ids is None:
            return type(layer).forward(layer, x)
        weight = layer.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            # The base stays trainable as it was; the fused op has no gradient for a weight.
            return type(layer).forward(layer, x) + sgmv(x, self.bank, ids)
        return multi_lora_linear(x, weight.t() if type(layer) is Conv1D else weight, self.bank, ids, bias=layer.bias)

    def __deepcopy__(self, memo):
        layer = memo.get(id(self.layer), self.layer)
        return types.MethodType(type(layer).forward, layer)

    def __reduce__(self):
        # When this runs at loading, the layer has no attributes yet: it is the forward of its class.
        return getattr, (self.layer, "forward")

"""One layer with attached adapters: its forward, and which adapter each of its rows takes."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...autograd.multi_lora_linear import multi_lora_linear, sgmv
from ...autograd.shapes import cast, cast_base, uncast
from ...bases.base import Base, base_of
from ...many.adapter import Adapter
from ...many.bank import AdapterBank
from ...methods import quantised
from ...methods.look import NotCovered
from ...methods.quantised import Frozen
from .compiled import number_of
from .request import Batch, Each, Entry, Request, batch_of, current_request
from .rows import UNKNOWN, Rows

_PLAIN = (Tensor, nn.Parameter)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FIRST = Rows(0)
_REPACKS = "support_avx512bf16_for_cpu"


def layer_reason(layer: nn.Module) -> str | None:
    """Why this layer can carry no attached adapters, or None."""
    cls = type(layer)
    of_library = quantised.reader_of(layer) is not None
    if cls is not nn.Linear and cls is not Conv1D and not of_library:
        return (
            f"is a {cls.__module__}.{cls.__qualname__}, expected torch.nn.Linear, transformers' Conv1D or a quantised layer"
            " of bitsandbytes, torchao, quanto or HQQ"
        )
    reason = forward_reason(layer)
    if reason is not None:
        return reason
    if of_library:
        try:
            device = quantised.now(layer).weight.device
        except NotCovered as refused:
            return f"is quantised, but {refused}"
        return "has no weight yet (device meta)" if device.type == "meta" else None
    weight = layer.weight
    if type(weight) not in _PLAIN or weight.layout is not torch.strided or weight.dtype not in _FLOATS:
        return f"has a weight that is a {weight.dtype} {type(weight).__name__}"
    if device_of(layer).type == "meta":
        return "has no weight yet (device meta)"
    return None


def forward_reason(module: nn.Module) -> str | None:
    """Why the forward of this module cannot be replaced, or None."""
    forward = module.__dict__.get(forward_attribute(module))
    if isinstance(forward, Attached):
        return "has adapters attached already: add to those"
    # accelerate's hooks, while there and once removed, leave the class's own method on the layer, as copies do.
    if forward is not None and forward != types.MethodType(type(module).forward, module):
        return "has a forward that was replaced"
    return None


def forward_attribute(layer: nn.Module) -> str:
    """Where a layer's own forward is to be replaced: accelerate's hooks wrap the one that they keep beside them."""
    wrapper = layer.__dict__.get("forward")
    hooked = getattr(getattr(wrapper, "func", None), "__module__", None) == "accelerate.hooks"
    return "_old_forward" if hooked and "_old_forward" in layer.__dict__ else "forward"


def device_of(layer: nn.Module) -> torch.device:
    """Where the layer computes: its weight's device, or the one to which accelerate brings an offloaded weight."""
    hook = layer.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and getattr(one, "execution_device", None) is not None:
            return torch.device(one.execution_device)
    return frozen(layer).weight.device


def dtype_of(layer: nn.Module, of_codes: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype of the layer's weight, as the layer shows it; ``of_codes`` where it shows codes."""
    dtype = getattr(getattr(layer, "weight", None), "dtype", of_codes)
    return dtype if dtype.is_floating_point else of_codes


def frozen(layer: nn.Module) -> Frozen:
    """Weight and bias of the layer as they are now. NotCovered for a quantised layer that has become something else."""
    return quantised.now(layer) or Frozen(layer.weight, layer.bias)


def frozen_at_work(layer: nn.Module) -> Frozen:
    """The same where the layer computes, also if accelerate keeps them off the layer between calls."""
    weight, bias, uncasts = frozen(layer)
    hook = layer.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if weight.device.type == "meta" and getattr(one, "offload", False):
            device = device_of(layer)
            weight = one.weights_map["weight"].to(device)
            bias = None if bias is None else one.weights_map["bias"].to(device)
    return Frozen(weight, bias, uncasts)


def features(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a covered layer."""
    if quantised.reader_of(layer) is not None:
        return layer.in_features, layer.out_features
    N, K = layer.weight.shape
    return (N, K) if type(layer) is Conv1D else (K, N)


class Replacement:
    """What takes the place of a module's method on the instance.

    A copy or a pickle of the module is plain again: it runs the base model, also where ``outside`` is "error".
    """

    method = "forward"

    def __init__(self, owner, name: str, module: nn.Module):
        self.owner, self.name, self.module, self.left = owner, name, module, False
        self._place = forward_attribute(module) if self.method == "forward" else self.method
        self._before = module.__dict__.get(self._place)  # another library's, which it goes on to call

    def inner(self, *args, **kwargs) -> Any:
        """The method as it was."""
        if self._before is not None:
            return self._before(*args, **kwargs)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    def put(self) -> None:
        """Take the method's place."""
        self.module.__dict__[self._place] = self

    def take_back(self) -> None:
        """Give the place back, unless something else has taken it since: a hook that came or went moves it along."""
        before = self._before
        while isinstance(before, Replacement) and before.left:
            before = before._before
        for place in (self.method, "_old_forward"):
            if self.module.__dict__.get(place) is not self:
                continue
            if before is not None or place != self.method:
                self.module.__dict__[place] = before or self._own(self.module)
            else:
                del self.module.__dict__[place]
        self.left = True

    def _own(self, module: nn.Module) -> types.MethodType:
        return types.MethodType(getattr(type(module), self.method), module)

    def __deepcopy__(self, memo):
        module = memo.get(id(self.module), self.module)
        return self._own(module)

    def __reduce__(self):
        # When this runs at loading, the module has no attributes yet: it is the method of its class.
        return getattr, (self.module, self.method)


class NoGradient(torch.autograd.Function):
    """y; a backward pass that asks for the gradients of weight or bias raises RuntimeError, instead of leaving them out."""

    @staticmethod
    def forward(ctx, y: Tensor, reason: str, weight: Tensor | Base, bias: Tensor | None) -> Tensor:
        ctx.reason = reason
        ctx.mark_dirty(y)  # y itself, not a view of it, which a model could not write to
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        if any(ctx.needs_input_grad[2:]):
            raise RuntimeError(
                f"{ctx.reason}, whose weight and bias get no gradient through it: freeze them with requires_grad_(False)"
            )
        return dy, None, None, None


class Attached(Replacement):
    """The forward of a module: the base model's outside of ``use``, else that of all adapters at once.

    A kind of module says where it keeps adapters (``add``, ``remove``, ``slots`` as in a request, ``nbytes``), and what it
    computes.
    """

    def __init__(self, owner, name: str, module: nn.Module):
        super().__init__(owner, name, module)
        self.number = number_of(self)
        self._trained = False

    def serve(
        self, x: Tensor, batch: Batch | None, base: Callable[[], Tensor], adapted: Callable[[Tensor, Each], Tensor]
    ) -> Tensor:
        """y for an input of the module. ``batch``: the call that it belongs to, if the context does not show it. ``base``: y
        without adapters; ``adapted``: with those of these ids, one per leading index or row of x.
        """
        request = current_request(self.owner)
        if request is None:
            self._outside()
            return base()
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError(
                f"torch.jit.trace would keep the adapters of this use() block in {self.name} for every later caller: use"
                " torch.compile, or trace outside of use(), which gives the base model"
            )
        if batch is None and not request.uniform:
            batch = batch_of(request)
        trace = None if batch is None else batch.trace
        rows = _FIRST
        if trace is not None:
            rows = batch.rows_of(self, x)  # found for later batches, whether or not these adapters differ here
        each = request.each(self)
        if not each.any or not x.shape[:-1].numel():
            return base()
        self._trained |= x.requires_grad
        copies = 0
        if each.differ:
            rows, copies = self._rows(request, batch, x), batch.copies
        ids = request.ids(self, x.shape if x.dim() > 1 else (1, *x.shape), x.device, rows if copies else _FIRST, copies)
        decided = trace is not None and trace.decided
        y = adapted(ids, each)
        if trace is not None:
            trace.decided = decided  # what is read in here chooses no way through the model
            trace.mark(y, UNKNOWN if rows is None else rows)
            trace.computed(y)
        return y

    def _outside(self) -> None:
        self.owner.check_outside(self.name)
        if self._trained and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{self.name} is recomputed in backward outside of the use() block in which it ran: call backward inside"
            )

    def _rows(self, request: Request, batch: Batch | None, x: Tensor) -> Rows:
        if batch is None:
            raise ValueError(
                f"{self.name} gets an input of shape {tuple(x.shape)} outside of a call of the model, with"
                f" {len(request.names)} names: whose rows these are is not known. Call the model, or name one adapter"
            )
        rows = batch.rows_of(self, x)
        if rows is None and batch.lost:
            raise ValueError(
                f"{self.name} gets an input of shape {tuple(x.shape)} in a batch of {batch.rows} sequences with different"
                " adapters, and this call went another way through the model than the one by which whose rows these are"
                " is known: call again, the next call is followed anew, or name one adapter for all (use('name'))"
            )
        if rows is None:
            raise ValueError(
                f"{self.name} gets an input of shape {tuple(x.shape)} in a batch of {batch.rows} sequences with different"
                " adapters, and whose rows these are is not known here (the model reorders, selects or shares them)."
                " Call the model with one adapter for all (use('name')), or remove this layer from the adapters"
            )
        return rows


class AttachedLinear(Attached):
    """The forward of a linear layer, whose adapters lie in a bank."""

    def __init__(self, owner, name: str, module: nn.Module, bank: AdapterBank):
        super().__init__(owner, name, module)
        self.bank = bank

    @property
    def slots(self) -> Hashable:
        """See ``Layer`` in request.py."""
        return self.bank.snapshot().slots

    @property
    def nbytes(self) -> int:
        """Bytes of its adapters."""
        return self.bank.nbytes

    def add(self, entry: Entry, adapter: Adapter) -> None:
        """Keep an adapter of this layer."""
        A, B, scaling, coefficients = adapter.lora_A, adapter.lora_B, adapter.scaling, adapter.coefficients
        if (
            A is None or A.shape[0] or adapter.beside()
        ):  # otherwise all of its ranks are pruned: the layer is the base's
            entry.ids[self] = self.bank.add(entry.key, A, B, scaling, bias=adapter.bias, **coefficients)

    def remove(self, entry: Entry) -> None:
        """Forget it."""
        self.bank.remove(entry.key)

    def __call__(self, *args, **kwargs) -> Tensor:
        if len(args) + len(kwargs) != 1:
            return self.inner(*args, **kwargs)
        (x,) = args or kwargs.values()
        if torch.compiler.is_compiling() and self._before is None:
            return self._in_graph(x)
        return self.run(x, self._frozen())

    def put(self) -> None:
        """Take the method's place."""
        super().put()
        # In eval mode bitsandbytes may lay 4 bits out anew, for its own product on this CPU alone.
        self._repacks = self.module.__dict__.get(_REPACKS)
        if self._repacks:
            setattr(self.module, _REPACKS, False)

    def take_back(self) -> None:
        """Give the place back."""
        super().take_back()
        if self._repacks:
            setattr(self.module, _REPACKS, True)

    def _frozen(self) -> Frozen:
        try:
            return frozen(self.module)
        except NotCovered as refused:
            raise RuntimeError(f"{self.name} has adapters attached, but {refused}") from None

    def _in_graph(self, x: Tensor) -> Tensor:
        weight, bias, uncasts = self._frozen()
        kind, tensors, _ = base_of(weight)
        if torch.is_autocast_enabled(x.device.type) and not uncasts:
            # Within a graph no state says so when the op runs.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, tensors = x.to(dtype), cast_base(kind, tensors, dtype)
            bias = bias if bias is None or bias.dtype == torch.float32 else bias.to(dtype)
        _, N = features(self.module)
        return torch.ops.peftkern.attached_linear(x, list(tensors), kind, bias, N, self.number, self.owner.graph_batch)

    def run_op(self, x: Tensor, weight: list[Tensor], kind: str, bias: Tensor | None, batch: Batch | None) -> Tensor:
        """``run`` within a graph: the weight as ops take it."""
        K, N = features(self.module)
        return self.run(x, Frozen(weight[0] if kind == "dense" else Base(kind, tuple(weight), (N, K)), bias), batch)

    def run(self, x: Tensor, layer: Frozen, batch: Batch | None = None) -> Tensor:
        """y for an input of the layer. ``batch``: the call that it belongs to, if the context does not show it."""
        return self.serve(x, batch, lambda: self._base(x, layer), lambda ids, each: self._adapted(x, layer, ids))

    def _adapted(self, x: Tensor, layer: Frozen, ids: Tensor) -> Tensor:
        weight, bias, uncasts = layer
        if uncasts and torch.is_autocast_enabled(x.device.type):
            with uncast(x):
                return self._adapted(x, layer._replace(uncast=False), ids)
        codes = isinstance(weight, Base)
        trainable = quantised.weight_trains(self.module) if codes else weight.requires_grad
        trains = torch.is_grad_enabled() and (trainable or (bias is not None and bias.requires_grad))
        beside = self.bank.snapshot().beside if trains else None
        if trains and trainable and beside is None:
            # The base stays trainable as it was; the fused op has no gradient for a weight.
            return self._base(x, layer) + sgmv(x, self.bank, ids)
        y = self._fused(x, weight.detach() if trainable and not codes else weight, bias, ids)
        if beside is None:
            return y
        return NoGradient.apply(
            y, f"{self.name}: {beside} acts on the base", self.module.weight if codes else weight, bias
        )

    def _fused(self, x: Tensor, weight: Tensor | Base, bias: Tensor | None, ids: Tensor) -> Tensor:
        return multi_lora_linear(x, weight.t() if type(self.module) is Conv1D else weight, self.bank, ids, bias=bias)

    def _base(self, x: Tensor, layer: Frozen) -> Tensor:
        weight, bias, _ = layer
        if isinstance(weight, Base) or weight is self.module.weight:
            return self.inner(x)
        bias = None if bias is None else cast(bias, x.dtype)
        if type(self.module) is nn.Linear:
            return nn.functional.linear(x, weight, bias)
        return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])

"""The forward of a PEFT LoRA layer on the fused op, and the switch that puts it in place.

The switch replaces ``peft.tuners.lora.layer.Linear.forward`` once, with a function that runs PEFT's own
forward unless the instance carries a mark (``accelerate``) or every layer is wanted (``patch``). So an
accelerated layer keeps its type, its parameters, its hooks and its pickle; the mark is one entry of its
``__dict__``. ``LoraModel._enable_peft_forward_hooks`` is replaced likewise, so that ``adapter_names`` may train. When
the last mark is gone and no patch is in force, the classes get their own functions back.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from torch import Tensor

from ...autograd.lora_linear import lora_linear
from .fsdp import AtRest, Unit, plain_parts, run_inside, units
from .guard import Branch, Plan, call_plan, read
from .mixed import left_as_after_success, mixed_plan, run_mixed, training_hooks, training_reason
from .status import KEY as CALLS
from .status import calls_of, clear_calls, note_stock

KEY = "_peftkern_accelerated"

_whole = AtRest(read, units_alone=True)


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _folded_bias(x: Tensor, bias: Tensor | None, branches: list[Branch]) -> Tensor | None:
    # lora_bias is part of the branch, so it is scaled: beta = bias + sum s * bias_B, O(N) and left to
    # autograd.
    dtype = _accumulate(x)
    for b in branches:
        if b.bias is not None:
            term = b.bias.to(dtype) * (b.scaling.to(dtype) if isinstance(b.scaling, Tensor) else b.scaling)
            bias = term if bias is None else bias.to(dtype) + term
    return bias


def _stacked(x: Tensor, branches: list[Branch]) -> dict:
    # Adapters without dropout add up to one adapter: ranks one below the other, scalings as a rank scale.
    lora_A = torch.cat([b.lora_A for b in branches], dim=0)
    lora_B = torch.cat([b.lora_B for b in branches], dim=1)
    scalings = [b.scaling for b in branches]
    if not any(isinstance(s, Tensor) for s in scalings) and all(s == scalings[0] for s in scalings):
        return {"lora_A": lora_A, "lora_B": lora_B, "scaling": scalings[0]}
    dtype = _accumulate(x)
    pieces = [
        b.scaling.to(dtype).reshape(1).expand(b.lora_A.shape[0])
        if isinstance(b.scaling, Tensor)
        else x.new_full((b.lora_A.shape[0],), b.scaling, dtype=dtype)
        for b in branches
    ]
    return {"lora_A": lora_A, "lora_B": lora_B, "rank_scale": torch.cat(pieces)}


def _run(layer: Linear, plan: Plan, x: Tensor) -> Tensor:
    weight, bias, branches = plan
    dropping = [b for b in branches if b.dropout_p > 0.0]
    if len(branches) > 1 and not dropping:
        return lora_linear(x, weight, **_stacked(x, branches), bias=_folded_bias(x, bias, branches))
    # Masks are independent, so at most one adapter that drops can share the op with the base: one that
    # drops, since that costs PEFT's code the most memory. The others (a rare setting) are added as PEFT
    # computes them.
    fused = dropping[0] if dropping else branches[0]
    p = fused.dropout_p
    y = lora_linear(
        x, weight, fused.lora_A, fused.lora_B, bias=_folded_bias(x, bias, [fused]),
        scaling=fused.scaling, dropout_p=p, training=p > 0.0,
    )  # fmt: skip
    if len(branches) == 1:
        return y
    result = y
    for b in branches:
        if b is not fused:
            dropped = layer.lora_dropout[b.name](layer._cast_input_dtype(x, b.lora_A.dtype))
            result = result + layer.lora_B[b.name](layer.lora_A[b.name](dropped)) * b.scaling
    return result.to(y.dtype)


class Mark:
    """Says that a layer is accelerated, and counts as one for as long as the layer lives."""

    __slots__ = ("__weakref__",)

    def __init__(self) -> None:
        _marks.add(self)

    def __deepcopy__(self, memo) -> Mark:
        return Mark()

    def __reduce__(self):
        # A plain True: the pickle of an accelerated model loads where only PEFT is installed.
        return bool, (1,)


class _Switch:
    """Process-wide state, changed under the lock only."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.everywhere = False
        self.stock = Linear.forward
        self.fused = None
        self.stock_hooks = LoraModel._enable_peft_forward_hooks
        self.hooks = None


_marks: weakref.WeakSet[Mark] = weakref.WeakSet()
# Layers that a mixed batch trains: see _no_recomputation.
_mixed: weakref.WeakSet[Linear] = weakref.WeakSet()
switch = _Switch()


def replaced_reason() -> str | None:
    """Why PEFT's forward is not ours to replace (another library did), or None."""
    current = Linear.forward
    if current is switch.fused:
        return None
    module, name = getattr(current, "__module__", "?"), getattr(current, "__qualname__", "?")
    if (module, name) == ("peft.tuners.lora.layer", "Linear.forward") and not hasattr(current, "__wrapped__"):
        return None
    return f"PEFT's Linear.forward was replaced by {module}.{name}"


def wanted(layer: Linear) -> bool:
    """Whether the user asked for this layer: by its own mark, else by the patch of the process."""
    mark = layer.__dict__.get(KEY)
    return switch.everywhere if mark is None else mark is not False


def _no_recomputation(layer: Linear) -> None:
    # A checkpoint that runs a layer again in backward, without the hooks that brought the names, would silently give
    # the gradients of another function.
    if layer in _mixed:
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "a layer of a batch with adapter_names is recomputed in backward, where the names are not known:"
                " use the model's own gradient_checkpointing_enable(), or torch.utils.checkpoint around the whole model"
            )
        _mixed.discard(layer)


def _plan_inside(layer: Linear, x: Tensor, names, inside: list[Unit]):
    # The plan of this call once the shards of these units are whole, or the reason why PEFT's own code runs anyway:
    # then in no unit of ours.
    with plain_parts(inside):
        return call_plan(layer, x, None, _whole) if names is None else mixed_plan(layer, x, names, _whole)


def _fused_forward(stock):
    @functools.wraps(stock)
    def forward(self, x, *args, **kwargs):
        if not wanted(self):
            return stock(self, x, *args, **kwargs)
        names = kwargs.get("adapter_names")
        others = args or kwargs.keys() - {"adapter_names"}
        if others:
            plan = "the call has arguments of its own"
        elif names is None:
            if _mixed and not torch.compiler.is_compiling():
                _no_recomputation(self)
            plan = call_plan(self, x)
        else:
            plan = mixed_plan(self, x, names)
        # A graph that counted would be compiled anew at each call.
        if not torch.compiler.is_dynamo_compiling():
            if type(plan) is str:
                inside = [] if others else units(self, names)
                if inside:
                    plan = _plan_inside(self, x, names, inside)
                    if type(plan) is not str:
                        return run_inside(inside, x, lambda x: forward(self, x, **kwargs))
                note_stock(self, plan)
            else:
                calls = self.__dict__.get(CALLS)
                if calls is None:
                    calls = calls_of(self)
                calls.fused += 1
        if type(plan) is Plan:
            return _run(self, plan, x)
        if type(plan) is tuple:
            return run_mixed(*plan, x)
        return stock(self, x, *args, **kwargs)

    return forward


def _mixed_hooks(stock):
    @contextlib.contextmanager
    @functools.wraps(stock)
    def hooks(self, *args, **kwargs):
        names = kwargs.get("adapter_names")
        reason = ""
        if names is not None and self.training and kwargs.get("alora_offsets") is None:
            reason = training_reason(self, names, wanted)
            if reason:
                raise ValueError(f"Cannot pass `adapter_names` when the model is in training mode: {reason}")
        if reason is None:
            rest = {k: v for k, v in kwargs.items() if k != "adapter_names"}
            _mixed.update(m for m in self.modules() if isinstance(m, Linear))
            with training_hooks(stock, self, names, args, rest):
                yield
        else:
            context = stock(self, *args, **kwargs)
            ours = names is not None and any(isinstance(m, Linear) and wanted(m) for m in self.modules())
            with left_as_after_success(context) if ours else context:
                yield

    return hooks


def install() -> None:
    """Put the switching forward into PEFT's class. Idempotent."""
    with switch.lock:
        if Linear.forward is not switch.fused:
            switch.stock = Linear.forward
            switch.fused = _fused_forward(switch.stock)
            Linear.forward = switch.fused
        if LoraModel._enable_peft_forward_hooks is not switch.hooks:
            switch.stock_hooks = LoraModel._enable_peft_forward_hooks
            switch.hooks = _mixed_hooks(switch.stock_hooks)
            LoraModel._enable_peft_forward_hooks = switch.hooks


def uninstall_if_unused() -> None:
    """Give PEFT's classes their own functions back if no mark and no patch is left.

    If another library has replaced one of them since, that stays; ours below it then passes every call on.
    """
    with switch.lock:
        unused = not switch.everywhere and not len(_marks)
        if unused and switch.fused is not None and Linear.forward is switch.fused:
            Linear.forward = switch.stock
            switch.fused = None
        if unused and switch.hooks is not None and LoraModel._enable_peft_forward_hooks is switch.hooks:
            LoraModel._enable_peft_forward_hooks = switch.stock_hooks
            switch.hooks = None


def set_mark(layer: Linear) -> None:
    """Accelerate this layer from its next call on."""
    if type(layer.__dict__.get(KEY)) is not Mark:
        layer.__dict__[KEY] = Mark()


def clear_mark(layer) -> None:
    """Run PEFT's own code in this layer from its next call on, under ``patch`` too."""
    layer.__dict__.pop(KEY, None)
    clear_calls(layer)
    if switch.everywhere:
        layer.__dict__[KEY] = False

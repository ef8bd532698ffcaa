"""Which calls of a PEFT layer the fused op may take, decided anew at each call.

``look_at_call`` looks at the layer, ``input_reason`` at the input, ``process_reason`` at what holds for all layers; a kept plan
(``kept.py``) says in one native call that all of it looks as it did. A hook, an adapter or a dtype that changes between two
calls is always seen. Nothing here depends on grad mode: reentrant checkpointing runs the forward once without and once with
it, and both runs must take the same path (else they draw different dropout bits).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from ...bases.base import Base
from ...methods import tuner
from ...methods.look import PLAIN_TENSORS, Look, NotCovered, Record, only_aligns, read
from ...methods.quantised import COMPUTE, computed
from ...methods.registry import METHODS, Method, Plan, loaded, method_of
from ..process import process_reason
from ..tested import release_reason, replaced_by
from . import experts as _experts
from . import fsdp as _fsdp

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Read = Callable[[nn.Module, str], Any]
FUSED: dict[type, Callable] = {}  # the forward of each class that has ours


def version_reason(library: str, version: str, methods: Iterable[Method] | None = None) -> str | None:
    """Why this release of a library is not covered by any of these methods (default: all), or None."""
    methods = METHODS.values() if methods is None else methods
    tested = [method.tested[library] for method in methods if library in method.tested]
    if not tested:
        return None
    low, high = min(low for low, _ in tested), max(high for _, high in tested)
    return release_reason(library.upper(), version, low, high)


def type_reason(layer: nn.Module) -> str | None:
    """Why a layer of this type is not covered, or None. Exact: a subclass may compute anything."""
    cls = type(layer)
    if cls is ParamWrapper:
        reason = _experts.base_reason(layer)
        if reason is not None:
            return reason
    elif method_of(cls) is None:
        why = ": its adapters are merged into packed projections for each call" if cls is MultiheadAttention else ""
        return f"layer type {cls.__module__}.{cls.__qualname__} is not covered{why}"
    if "forward" in layer.__dict__ and not only_aligns(layer, cls):
        return "its forward was replaced on the instance"
    return None


def replaced_reason(cls: type) -> str | None:
    """Why the forward of this class is not ours to replace (another library did), or None."""
    owner = next(c for c in cls.__mro__ if "forward" in vars(c))  # that of a parent may be ours
    other = replaced_by(cls, FUSED.get(owner))
    return None if other is None else f"PEFT's {cls.__qualname__}.forward was replaced by {other}"


def _dtype_reason(look: Look, plan: Plan, x: Tensor) -> str | None:
    device = x.device.type
    weight, bias, held, kind, uncast = plan
    if kind is not None and kind.takes_ids:  # beside which nothing is cast
        wrong = (t.dtype for t in (weight, *(h.tensors[0] for h in held)) if t.dtype not in (*_FLOATS, torch.float64))
        return next((f"a weight is {dtype}" for dtype in wrong), None)
    quantised, method = isinstance(weight, Base), method_of(type(look.module))
    autocast = torch.is_autocast_enabled(device) and not uncast
    widened = autocast or x.dtype != torch.float32
    if quantised and widened and method.widens and type(look.module) is not loaded(method.layer):
        return f"{method.name} on bitsandbytes makes fp32 of half precision"
    if autocast:
        # Autocast makes half precision out of all of these, but leaves fp64 alone.
        tensors = [x, *([] if quantised else [weight]), *(h.tensors[0] for h in held)]
        if any(t.dtype not in _FLOATS for t in tensors) or not (bias is None or bias.dtype in _FLOATS):
            return "a dtype that autocast does not cast"
        return None
    if not quantised and (weight.dtype != x.dtype or not (bias is None or bias.dtype == x.dtype)):
        return f"the input is {x.dtype}, the base layer is not"
    if x.dtype not in _FLOATS and (x.dtype != torch.float64 or quantised):
        return f"the input is {x.dtype}"
    widens = all(level.value("cast_input_dtype_enabled", True) for level in tuner.levels(look))
    for h in held:
        dtype = h.tensors[0].dtype
        if dtype != x.dtype and not (dtype == torch.float32 and widens):
            return f"adapter {h.name!r} is {dtype}, the input is {x.dtype}"
    return None


def input_reason(look: Look, plan: Plan, x: Any) -> str | None:
    """Why the fused op cannot take this input (PEFT then takes it, or raises its own error), or None."""
    if type(x) not in PLAIN_TENSORS or x.layout is not torch.strided or x.is_nested:
        return "the input is not a plain dense tensor"
    device = x.device
    if device.type not in ("cpu", "cuda"):
        return f"device type {device.type} is not covered"
    if x.dim() < 1 or (plan.kind is None and x.shape[-1] != plan.weight.shape[1]):
        return f"the input has shape {tuple(x.shape)}"
    reason = None if plan.kind is None else plan.kind.refuses(plan, x)
    if reason is not None:
        return reason
    if plan.weight.device != device or not (plan.bias is None or plan.bias.device == device):
        return "the base layer is on another device than the input"
    for h in plan.held:
        for t in (*h.tensors, *h.numbers):
            if isinstance(t, Tensor) and t.device != device:
                return f"adapter {h.name!r} is on another device than the input"
    return _dtype_reason(look, plan, x)


def _layer_plan(look: Look, mixed: Sequence[str] | None) -> Plan | str:
    cls = type(look.module)
    method = method_of(cls)
    if method is None or not look.runs_forward(cls):
        return type_reason(look.module)
    if mixed is not None and not method.mixed:
        return f"a batch with adapter_names is not covered for {method.name}"
    try:
        for inner in tuner.levels(look)[1:]:
            reason = replaced_reason(type(inner.module))
            if reason is not None:
                return reason
            inner.class_stays()
        plan = tuner.plan(look, method, mixed) if method.plan is None else method.plan(look, mixed)
        plan = plan._replace(weight=computed(plan.weight, look.value(COMPUTE)))
    except NotCovered as reason:
        return str(reason)
    # An adapter may make another method of the layer, which other releases have been tested with.
    return next(filter(None, (_release_reason(h.method.name, peft.__version__) for h in plan.held)), plan)


@functools.cache
def _release_reason(method: str, version: str) -> str | None:
    reason = version_reason("peft", version, [METHODS[method]])
    return None if reason is None else f"{method}: {reason}"


def look_at_call(
    layer: nn.Module, x: Any, mixed: Sequence[str] | None = None, read: Read = read
) -> tuple[Look, Plan | str]:
    """The look at a layer, and the plan of this call or the reason why it runs PEFT's own code.

    ``mixed``: the adapters of a batch in which each row takes one of them; the active ones do not count then. ``read``: how
    a parameter is looked up.
    """
    look = Look(layer, Record(read, _fsdp.trains))
    plan = process_reason() or _layer_plan(look, mixed)
    return look, (plan if isinstance(plan, str) else input_reason(look, plan, x) or plan)


def call_plan(layer: nn.Module, x: Any, mixed: Sequence[str] | None = None, read: Read = read) -> Plan | str:
    """The plan of this call, or the reason why it runs PEFT's own code. Arguments as for ``look_at_call``."""
    return look_at_call(layer, x, mixed, read)[1]


def experts_plan(layer: ParamWrapper, *call: Any) -> _experts.ExpertsPlan | str:
    """What a call of an experts module with these arguments computes, or the reason why it runs PEFT's own code. Without
    arguments only what does not depend on them is judged."""
    reason = type_reason(layer) or process_reason()
    if reason is not None:
        return reason
    try:
        if COMPUTE in layer.__dict__:
            raise NotCovered("compute='int8' is for weights of kind int8, experts have dense ones")
        return _experts.call_plan(layer, *call) if call else _experts.look_at(layer)
    except NotCovered as reason:
        return str(reason)


def static_plan(layer: nn.Module, read: Read = read) -> Plan | str:
    """``call_plan`` of this layer, as it is now, for an input of its own dtype and device; of experts that of one of them."""
    if type(layer) is ParamWrapper:
        plan = experts_plan(layer)
        return plan if isinstance(plan, str) else plan.one()
    look = Look(layer, Record(read, _fsdp.trains))
    plan = _layer_plan(look, None)
    if isinstance(plan, str):
        return plan
    return input_reason(look, plan, plan.nothing()) or process_reason() or plan

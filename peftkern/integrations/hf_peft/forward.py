"""The forward of a PEFT layer on the fused op, and what puts it in place.

The ``forward`` of each layer's class is replaced by one that runs PEFT's own unless the instance is marked (``accelerate``) or
every layer is wanted (``patch``). What gives ``adapter_names`` to layers is replaced likewise (``names.py``). When the last
mark is gone and no patch is in force, the classes get their own functions back.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from functools import partial

import torch
from peft import PeftMixedModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ...methods.look import read
from ...methods.registry import Plan, layers
from ...methods.tuner import DISABLED
from ...methods.unchanged import EMPTY, at, items, same
from ...settings import current
from ..process import PROCESS
from ..status import KEY as CALLS
from ..status import TOO_SMALL, Calls, calls_of, note_stock
from ..switch import KEY, Switch
from .fsdp import AtRest, plain_parts, run_inside, units
from .guard import FUSED, call_plan, experts_plan, look_at_call, replaced_reason
from .kept import keep
from .mixed import activated_plan, mixed_plan, note_again, run_again, run_apart, run_mixed, takes_names
from .names import CONTEXT, call_of, context_of

_whole = AtRest(read, units_alone=True)
# Layers that a mixed batch trains: see _no_recomputation.
trained_mixed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
switch = Switch()
# What a kept plan looks at beside the layer and the process. A layer's own mark ends together with its kept plan.
_EVERYWHERE = at(vars(switch), items({"everywhere": same(True)}))
_NONE_MIXED = at(trained_mixed.data, EMPTY)


def _no_recomputation(layer: nn.Module) -> None:
    # A checkpoint that runs a layer again in backward, without the hooks that brought the names, would silently give
    # the gradients of another function.
    if layer in trained_mixed:
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "a layer of a batch with adapter_names is recomputed in backward, where the names are not known:"
                " use the model's own gradient_checkpointing_enable(), or torch.utils.checkpoint around the whole model"
            )
        trained_mixed.discard(layer)


def _looked_up(layer: nn.Module, x: Tensor, mixed: tuple[str, ...] | None, calls: Calls) -> Plan | str:
    # call_plan, which keeps what it finds for the next call.
    kept = calls.kept
    if mixed is not None and kept is not None and kept.mixed == mixed:
        plan = kept.plan(layer, x)
        if plan is not None:
            return plan
    look, plan = look_at_call(layer, x, mixed)
    if type(plan) is Plan and not torch.compiler.is_compiling():
        conditions = PROCESS if mixed is not None else (*PROCESS, _NONE_MIXED)
        if KEY not in layer.__dict__:
            conditions = (*conditions, _EVERYWHERE)
        calls.kept = keep(look, plan, x, mixed, conditions) or kept
        if mixed is None:
            calls.least = plan.least()
    return plan


def _too_small(calls: Calls, x: Tensor) -> bool:
    # The library's own code is right whatever the layer looks like by now, but where a batch with names is recomputed.
    if x.numel() >= calls.least or not x.is_cpu or trained_mixed:
        return False
    settings = current()
    return not (settings.small_calls or settings.batch_invariant)


def _plan(layer: nn.Module, x: Tensor, names, offsets, plan_of: Callable):
    # Of a call without arguments of its own but adapter_names and alora_offsets.
    if names is not None:
        return mixed_plan(layer, x, names, plan_of, offsets)
    return plan_of(None) if offsets is None else activated_plan(layer, x, offsets, plan_of)


def _carefully(layer: nn.Module, x: Tensor, args: tuple, kwargs: dict, stock):
    # The forward of a layer that is wanted, with a look at everything.
    names, offsets = kwargs.get("adapter_names"), kwargs.get("alora_offsets")
    others = args or kwargs.keys() - {"adapter_names", "alora_offsets"}
    if names is None and not others and trained_mixed and not torch.compiler.is_compiling():
        _no_recomputation(layer)
    # A graph that counted would be compiled anew at each call.
    calls = None if torch.compiler.is_dynamo_compiling() else calls_of(layer)
    if others:
        plan = "the call has arguments of its own"
    elif calls is None:
        plan = _plan(layer, x, names, offsets, lambda mixed: call_plan(layer, x, mixed))
    else:
        plan = _plan(layer, x, names, offsets, lambda mixed: _looked_up(layer, x, mixed, calls))
    if calls is not None and type(plan) is str:
        inside = [] if others else units(layer, names)
        if inside:
            # Once the shards of these units are whole. If PEFT's own code runs anyway, then in no unit of ours.
            with plain_parts(inside):
                plan = _plan(layer, x, names, offsets, lambda mixed: call_plan(layer, x, mixed, _whole))
            if type(plan) is not str:
                return run_inside(inside, x, lambda x: type(layer).forward(layer, x, **kwargs))
    if type(plan) is str and names is not None and not takes_names(layer):
        return run_apart(layer, x, names, stock, plan)
    if calls is not None:
        if calls.least and names is None and type(plan) is not str and _too_small(calls, x):
            plan = TOO_SMALL
        if type(plan) is str:
            note_stock(layer, plan)
        else:
            calls.fused += 1
    if type(plan) is Plan:
        return plan.run(x)
    if type(plan) is tuple:
        y = run_mixed(*plan, x)
        kept = None if calls is None or offsets is not None else calls.kept
        if kept is not None and kept.again is None and kept.mixed == plan[2].adapters:
            note_again(layer, kept, plan[1], x)
        return y
    return stock(layer, x, *args, **kwargs)


def _fused_forward(stock):
    @functools.wraps(stock)
    def forward(self, x, *args, **kwargs):
        calls = None if is_dynamo_compiling() else self.__dict__.get(CALLS)
        if calls is not None:
            disabled = self.__dict__.get("_disable_adapters") and not trained_mixed
            if (disabled or (calls.least and _too_small(calls, x))) and "adapter_names" not in kwargs:
                calls.stock += 1
                calls.reason = DISABLED if disabled else TOO_SMALL
                return stock(self, x, *args, **kwargs)
            kept = calls.kept
            if kept is not None and not args:
                # Counted first: a recomputation stops in the middle of the last layer that it needs.
                calls.fused += 1
                try:
                    if kept.mixed is not None:
                        y = run_again(self, kept, x, kwargs)
                        if y is not None:
                            return y
                    elif not kwargs:
                        plan = kept.plan(self, x)
                        if plan is not None:
                            return plan.run(x)
                except (TypeError, ValueError):
                    # The op refuses, before it computes anything, what a kept plan does not look at: shapes, devices.
                    calls.kept = None
                calls.fused -= 1
        if not switch.wanted(self):
            return stock(self, x, *args, **kwargs)
        return _carefully(self, x, args, kwargs, stock)

    return forward


def _experts_forward(stock):
    # A graph of torch.compile breaks here: how many rows an expert has is known on the host alone.
    @torch.compiler.disable
    def run(self, x, args, kwargs):
        calls = calls_of(self)
        plan = "the call has arguments of its own" if kwargs else experts_plan(self, x, *args)
        if type(plan) is str:
            note_stock(self, plan)
            return stock(self, x, *args, **kwargs)
        calls.fused += 1
        return plan.run(x, *args)

    @functools.wraps(stock)
    def forward(self, x, *args, **kwargs):
        if not switch.wanted(self) or torch.compiler.is_exporting():
            return stock(self, x, *args, **kwargs)
        return run(self, x, args, kwargs)

    return forward


def _giving_names() -> dict[tuple[type, str], Callable]:
    # What makes of PEFT's own functions those that give names to accelerated layers.
    context, call = (
        partial(context_of, wanted=switch.wanted, trained=trained_mixed.add),
        partial(call_of, wanted=switch.wanted),
    )
    contexts = {(cls, CONTEXT): context for cls in (LoraModel, BaseTuner)}
    return contexts | {(PeftMixedModel, name): call for name in ("forward", "generate")}


def install() -> None:
    """Put the switching forward into the class of each method that is loaded. Idempotent."""
    with switch.lock:
        for cls, make in [*((cls, _fused_forward) for cls, _ in layers()), (ParamWrapper, _experts_forward)]:
            if replaced_reason(cls) is None and cls.forward not in FUSED.values():
                switch.replace(cls, "forward", lambda own, cls=cls, make=make: make(cls.forward))
                FUSED[cls] = cls.forward
        for (cls, name), make in _giving_names().items():
            switch.replace(cls, name, make)


def uninstall_if_unused() -> None:
    """Give the libraries' classes their own functions back if no mark and no patch is left."""
    with switch.lock:
        switch.put_back_if_unused()
        for cls in [cls for cls in FUSED if (cls, "forward") not in switch.replaced]:
            del FUSED[cls]

"""Hugging Face PEFT: LoRA layers on the fused op, in place and reversibly.

``accelerate`` takes the ``peft.tuners.lora.layer.Linear`` layers of a model, ``patch`` those of the
process. Parameters, module types, state dict, hooks, pickles and everything that PEFT does with adapters
stay as they are; what changes is how a call computes base + branch. A call that is not covered runs PEFT's
own forward, with the same arguments.

``adapter_names`` batches run fused too, and train: then every adapter of the batch gets gradients (PEFT raises there;
``set_requires_grad`` or ``set_adapter`` of the tuner chooses which ones do). Every tuner has them whose adapters are
coefficients of a linear layer, where PEFT knows such batches of LoRA alone and drops the names of most others, and so has a
PeftMixedModel. Where a layer of another tuner than LoRA cannot run fused, such a call raises ValueError with the reason.

Results equal PEFT's to rounding. Dropout masks differ from PEFT's, their law does not;
``torch.manual_seed`` makes them reproducible. Under autocast fp32 adapters are used in fp32 where PEFT
rounds them. Second derivatives, which PEFT's own code has, raise an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import peft
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...methods.look import read
from ...methods.registry import Plan, layers, method_of
from .. import status as _status
from ..report import Report, Status, only_reference
from . import forward as _forward
from . import guard as _guard
from . import mixed as _mixed
from .experts import wrappers
from .fsdp import AtRest as _AtRest
from .fsdp import plain_parts, units
from .report import anything_else, backend_of


def _version_reason() -> str | None:
    return _guard.version_reason("peft", peft.__version__)


def _type_reason(layer: nn.Module) -> str | None:
    # What holds for all layers of this type.
    return _version_reason() or _guard.type_reason(layer) or _guard.replaced_reason(type(layer))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # PEFT's layers, and those of methods that have another; the nested wrappers of one module's parameters are one.
    nested: set[nn.Module] = set()
    for name, module in model.named_modules():
        if (isinstance(module, BaseTunerLayer) or method_of(type(module))) and module not in nested:
            if type(module) is ParamWrapper:
                nested.update(wrappers(module))
            yield name, module


def _static_plan(layer: nn.Module, at_rest: _AtRest) -> Plan | str:
    with plain_parts(units(layer)):
        return _guard.static_plan(layer, at_rest)


def _check_model(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def accelerate(model: nn.Module) -> Report:
    """Run the adapters of ``model`` fused from now on.

    Covered are the methods of docs/methods.md (``python -m peftkern methods``) on ``torch.nn.Linear`` and on transformers'
    ``Conv1D``, on CPU and CUDA; LoRA and DoRA on torch's convolutions and ``Embedding``; and on CPU LoRA on the parameters of
    transformers' experts (``target_parameters``), each module of them one layer. Calling it again takes layers that were
    added since. It may come before or after DDP, FSDP1 and ``fully_shard``, but before ``torch.compile``.

    Warns (RuntimeWarning) if no back end works here, so that the reference computes everything. Later a call of a layer
    that the report calls accelerated warns if it runs PEFT's own code: once for each kind of layer and reason, and not for
    what was asked for (disabled, merged or inactive adapters).

    Args:
        model: any module that contains PEFT layers (a PeftModel, a transformers model with adapters).

    Returns:
        Report: which PEFT layers are accelerated as of now, and why the others are not.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_model(model)
    report = Report()
    at_rest = _AtRest(read)
    warned: set[tuple[str, str]] = set()
    devices = set()
    with _forward.switch.lock:
        for name, module in _layers(model):
            plan = _type_reason(module)
            if plan is None:
                # Marked even if its present state speaks against it: states end, and each call looks again.
                _forward.install()
                _forward.switch.set_mark(module)
                plan = _static_plan(module, at_rest)
                _status.calls_of(module).warned = None if isinstance(plan, str) else warned
            if isinstance(plan, str):
                report.skipped[name] = plan
            else:
                report.accelerated.append(name)
                report.backends[name] = backend_of(plan)
                devices.add(plan.weight.device.type)
    for device in sorted(devices):
        reason = only_reference(device)
        if reason is not None:
            warnings.warn(
                f"peftkern: the PyTorch reference computes the accelerated layers, which makes nothing faster: {reason}."
                " python -m peftkern doctor says more.",
                RuntimeWarning,
                stacklevel=2,
            )
    if not report.accelerated and not report.skipped:
        report.note = anything_else(model)
    return report


def status(model: nn.Module, reset: bool = False) -> Status:
    """What the accelerated PEFT layers of ``model`` did since the last reset, or since they were accelerated.

    A call counts whenever PEFT's layer is called: recomputation by a checkpoint and each step of ``generate`` too, in
    every thread and every replica of DataParallel. Not counted are calls inside graphs of ``torch.compile``, layers that were
    not accelerated, and other layers than PEFT's (``LoRALinear`` and ``attach_adapters`` have no other code to run).

    Args:
        model: a module that contains PEFT layers.
        reset: start anew after this answer.

    Returns:
        Status: the numbers of calls, and why layers ran PEFT's own code.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_model(model)
    answer = Status()
    for name, module in _layers(model):
        calls = _status.known_calls(module)
        if calls is not None:
            answer.fused += calls.fused
            answer.stock += calls.stock
        reason = (calls.reason if calls is not None else None) or _guard.type_reason(module)
        if reason is not None:
            answer.reasons[name] = reason
        if reset and calls is not None:
            calls.reset()
    return answer


def restore(model: nn.Module) -> None:
    """Run PEFT's own code in every layer of ``model`` again, under ``patch`` too, until ``accelerate``.
    Idempotent.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_model(model)
    with _forward.switch.lock:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) or method_of(type(module)) or _forward.KEY in module.__dict__:
                _forward.clear_mark(module)
        _forward.uninstall_if_unused()


def patch() -> None:
    """Do what ``accelerate`` does for every PEFT LoRA layer of the process, present and future. Idempotent.

    Warns and changes nothing if the installed PEFT is outside the tested range.
    """
    reason = _version_reason() or next(filter(None, (_guard.replaced_reason(cls) for cls, _ in layers())), None)
    if reason is not None:
        warnings.warn(f"peftkern.patch does nothing: {reason}", RuntimeWarning, stacklevel=2)
        return
    with _forward.switch.lock:
        _forward.install()
        _forward.switch.everywhere = True


def unpatch() -> None:
    """Undo ``patch``. Models that were accelerated by name stay so until ``restore``. Idempotent."""
    with _forward.switch.lock:
        _forward.switch.everywhere = False
        _forward.uninstall_if_unused()


def why_not(layer: nn.Module, x: Any = None, adapter_names: Sequence[str] | None = None) -> str | None:
    """Why a call of this layer would run PEFT's own code right now, or None if it would run fused.

    Args:
        layer: a module of the model.
        x: the input of the call; without it only what does not depend on the input is judged.
        adapter_names: of a mixed batch, one per leading index of x.
    """
    reason = _type_reason(layer)
    if reason is not None:
        return reason
    if not _forward.switch.wanted(layer):
        return "it is not accelerated: call accelerate or patch"
    at_rest = _AtRest(read)
    if x is None or type(layer) is ParamWrapper:  # whose calls have more than x
        plan = _static_plan(layer, at_rest)
    else:
        with plain_parts(units(layer, adapter_names)):
            if adapter_names is None:
                plan = _guard.call_plan(layer, x, None, at_rest)
            else:
                plan_of = partial(_guard.call_plan, layer, x, read=at_rest)
                plan = _mixed.mixed_plan(layer, x, adapter_names, plan_of)
    return plan if isinstance(plan, str) else None

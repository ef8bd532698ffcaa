"""Hugging Face PEFT: LoRA layers on the fused op, in place and reversibly.

``accelerate`` takes the ``peft.tuners.lora.layer.Linear`` layers of a model, ``patch`` those of the
process. Parameters, module types, state dict, hooks, pickles and everything that PEFT does with adapters
stay as they are; what changes is how a call computes base + branch. A call that is not covered runs PEFT's
own forward, with the same arguments.

``adapter_names`` batches run fused too, and train: then every adapter of the batch gets gradients (PEFT raises there;
``set_requires_grad`` or ``set_adapter`` of the tuner chooses which ones do).

Results equal PEFT's to rounding. Dropout masks differ from PEFT's, their law does not;
``torch.manual_seed`` makes them reproducible. Under autocast fp32 adapters are used in fp32 where PEFT
rounds them. Second derivatives, which PEFT's own code has, raise an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import peft
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from . import hf_peft_forward as _forward
from . import hf_peft_guard as _guard
from . import hf_peft_mixed as _mixed
from .hf_peft_report import Report

__all__ = ["Report", "accelerate", "patch", "restore", "unpatch", "why_not"]


def _library_reason() -> str | None:
    return _guard.version_reason(peft.__version__) or _forward.replaced_reason()


def _check_model(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def accelerate(model: nn.Module) -> Report:
    """Run the LoRA layers of ``model`` on the fused op from now on.

    Covered are plain LoRA and rsLoRA adapters (any number, any dropout, lora_bias) on ``torch.nn.Linear``
    and on transformers' ``Conv1D``, on CPU and CUDA. Calling it again takes layers that were added since.
    Compile the model after this, not before.

    Args:
        model: any module that contains PEFT layers (a PeftModel, a transformers model with adapters).

    Returns:
        Report: which PEFT layers are accelerated as of now, and why the others are not.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_model(model)
    report = Report()
    library = _library_reason()
    with _forward.switch.lock:
        for name, module in model.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            reason = library or _guard.type_reason(module)
            if reason is None:
                # Marked even if its present state speaks against it: states end, and each call looks again.
                _forward.install()
                _forward.set_mark(module)
                reason = _guard.static_reason(module)
            if reason is None:
                report.accelerated.append(name)
            else:
                report.skipped[name] = reason
    return report


def restore(model: nn.Module) -> None:
    """Run PEFT's own code in every layer of ``model`` again, under ``patch`` too, until ``accelerate``.
    Idempotent.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_model(model)
    with _forward.switch.lock:
        for module in model.modules():
            if isinstance(module, Linear):
                _forward.clear_mark(module)
        _forward.uninstall_if_unused()


def patch() -> None:
    """Do what ``accelerate`` does for every PEFT LoRA layer of the process, present and future. Idempotent.

    Warns and changes nothing if the installed PEFT is outside the tested range.
    """
    reason = _library_reason()
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
    reason = _library_reason() or _guard.type_reason(layer)
    if reason is not None:
        return reason
    if not _forward.wanted(layer):
        return "it is not accelerated: call accelerate or patch"
    if x is None:
        return _guard.static_reason(layer)
    plan = _guard.call_plan(layer, x) if adapter_names is None else _mixed.mixed_plan(layer, x, adapter_names)
    return plan if isinstance(plan, str) else None

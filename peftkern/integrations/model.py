"""What ``accelerate`` does with a model: its layers on the fused ops, in place and reversibly, whichever library made them.

Parameters, module types, state dict, hooks, pickles and everything that a library does with adapters stay as they are; what
changes is how a call is computed. A call that is not covered runs the library's own forward, with the same arguments.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.util import find_spec

from torch import nn

from .library import Library
from .report import Report, Status, only_reference

# Package of the library -> ours. A model holds layers of those alone that the process has imported.
_PACKAGES = {"peft": "hf_peft", "adapters": "adapter_hub"}


def _libraries() -> list[Library]:
    names = [ours for theirs, ours in _PACKAGES.items() if sys.modules.get(theirs)]
    if not names and find_spec("peft") is None:
        raise ModuleNotFoundError("peftkern.accelerate needs peft, or adapters: pip install peft", name="peft")
    names = names or ["hf_peft"]
    return [importlib.import_module(f"{__package__}.{name}.model").LIBRARY for name in names]


def _check_model(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def accelerate(model: nn.Module, *, compute: str | None = None) -> Report:
    """Run the adapters of ``model`` fused from now on.

    Of HF PEFT are covered the methods of docs/methods.md (``python -m peftkern methods``) on ``torch.nn.Linear`` and on
    transformers' ``Conv1D``, on CPU and CUDA; LoRA and DoRA on torch's convolutions and ``Embedding``; and on CPU LoRA on the
    parameters of transformers' experts (``target_parameters``), each module of them one layer. Of AdapterHub's ``adapters``:
    bottleneck adapters of all configurations, Compacter(++) and invertible (NICE) ones. Calling it again takes layers that were
    added since. It may come before or after DDP, FSDP1 and ``fully_shard``, but before ``torch.compile``.

    Warns (RuntimeWarning) if no back end works here, so that the reference computes everything. Later a call of a layer
    that the report calls accelerated warns if it runs the library's own code: once for each kind of layer and reason, and not
    for what was asked for (disabled, merged or inactive adapters).

    Args:
        model: any module that contains layers of a library (a PeftModel, a transformers model with adapters).
        compute: "int8" for base layers in int8 with a scale for each row (bitsandbytes' Linear8bitLt, torchao's Int8Tensor,
            quanto's qint8): what meets such a weight is rounded to 8 bits by its row, forward and in the gradient of x, which
            changes each by about 1 % (``peftkern.quantize``), and products are of integers. PEFT's layers over other weights
            then run its own code, with the reason. None, or a call without it, undoes that.

    Returns:
        Report: which layers are accelerated as of now, and why the others are not.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no such ``compute``.
        ModuleNotFoundError: no such library is installed.
    """
    _check_model(model)
    if compute not in (None, "int8"):
        raise ValueError(f"compute is {compute!r}, expected 'int8' or None")
    report, libraries = Report(), _libraries()
    devices = set().union(*(library.accelerate(model, report, compute) for library in libraries))
    for device in sorted(devices):
        reason = only_reference(device)
        if reason is not None:
            warnings.warn(
                f"peftkern: the PyTorch reference computes the accelerated layers, which makes nothing faster: {reason}."
                " python -m peftkern doctor says more.",
                RuntimeWarning,
                stacklevel=2,
            )
    if not report.libraries:
        report.note = next(filter(None, (library.note(model) for library in libraries)), "")
    return report


def status(model: nn.Module, reset: bool = False) -> Status:
    """What the accelerated layers of ``model`` did since the last reset, or since they were accelerated.

    A call counts whenever the library's layer is called: recomputation by a checkpoint and each step of ``generate`` too, in
    every thread and every replica of DataParallel. Not counted are calls inside graphs of ``torch.compile``, layers that were
    not accelerated, and layers of no library (``LoRALinear`` and ``attach_adapters`` have no other code to run).

    Args:
        model: a module that contains layers of a library.
        reset: start anew after this answer.

    Returns:
        Status: the numbers of calls, and why layers ran the library's own code.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_model(model)
    answer = Status()
    for library in _libraries():
        library.status(model, answer, reset)
    return answer


def restore(model: nn.Module) -> None:
    """Run the library's own code in every layer of ``model`` again, under ``patch`` too, until ``accelerate``.
    Idempotent.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_model(model)
    for library in _libraries():
        library.restore(model)

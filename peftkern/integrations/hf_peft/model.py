"""Hugging Face PEFT: its layers on the fused ops, in place and reversibly.

``accelerate`` takes the layers of a model, ``patch`` those of the process.

``adapter_names`` batches run fused too, and train: then every adapter of the batch gets gradients (PEFT raises there;
``set_requires_grad`` or ``set_adapter`` of the tuner chooses which ones do). Every tuner has them whose adapters are
coefficients of a linear layer, where PEFT knows such batches of LoRA alone and drops the names of most others, and so has a
PeftMixedModel. Where a layer of another tuner than LoRA cannot run fused, such a call raises ValueError with the reason.

Results equal PEFT's to rounding. Dropout masks differ from PEFT's, their law does not;
``torch.manual_seed`` makes them reproducible. Under autocast fp32 adapters are used in fp32 where PEFT
rounds them. Second derivatives, which PEFT's own code has, raise an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import peft
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...methods.look import read
from ...methods.registry import Plan, layers, method_of
from ..library import Found, Library
from . import forward as _forward
from . import guard as _guard
from . import mixed as _mixed
from .experts import wrappers
from .fsdp import AtRest as _AtRest
from .fsdp import plain_parts, units
from .report import anything_else, backend_of


class HfPeft(Library):
    """PEFT's layers, and those of methods that have another."""

    name = "PEFT"
    switch = _forward.switch

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, BaseTunerLayer) or method_of(type(module)) is not None

    def layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        # The nested wrappers of one module's parameters are one.
        nested: set[nn.Module] = set()
        for name, module in super().layers(model):
            if module not in nested:
                if type(module) is ParamWrapper:
                    nested.update(wrappers(module))
                yield name, module

    def type_reason(self, layer: nn.Module) -> str | None:
        return _version_reason() or _guard.type_reason(layer) or _guard.replaced_reason(type(layer))

    def patch_reason(self) -> str | None:
        return _version_reason() or next(filter(None, (_guard.replaced_reason(cls) for cls, _ in layers())), None)

    def looks(self) -> Callable[[nn.Module], Found | str]:
        at_rest = _AtRest(read)

        def look(layer: nn.Module) -> Found | str:
            plan = _static_plan(layer, at_rest)
            return plan if isinstance(plan, str) else Found(backend_of(plan), plan.weight.device.type)

        return look

    def install(self) -> None:
        _forward.install()

    def uninstall_if_unused(self) -> None:
        _forward.uninstall_if_unused()

    def note(self, model: nn.Module) -> str:
        return anything_else(model)


LIBRARY = HfPeft()


def _version_reason() -> str | None:
    return _guard.version_reason("peft", peft.__version__)


def _static_plan(layer: nn.Module, at_rest: _AtRest) -> Plan | str:
    with plain_parts(units(layer)):
        return _guard.static_plan(layer, at_rest)


def why_not(layer: nn.Module, x: Any = None, adapter_names: Sequence[str] | None = None) -> str | None:
    """Why a call of this layer would run PEFT's own code right now, or None if it would run fused.

    Args:
        layer: a module of the model.
        x: the input of the call; without it only what does not depend on the input is judged.
        adapter_names: of a mixed batch, one per leading index of x.
    """
    reason = LIBRARY.type_reason(layer)
    if reason is not None:
        return reason
    if not LIBRARY.switch.wanted(layer):
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

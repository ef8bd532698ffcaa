"""Who computes an accelerated layer of PEFT, and what a model without one holds."""

from __future__ import annotations

from peft import PeftConfig
from torch import nn

from ...methods.registry import Plan
from ..report import ROWS, computed_by

_LIBRARIES = {"loralib": "loralib", "pyreft": "pyreft", "pyvene": "pyvene"}


def backend_of(plan: Plan) -> str:
    """Name of the back end that computes this layer, forward and backward."""
    return computed_by(plan.call(ROWS)) if plan.kind is None else plan.kind.by


def anything_else(model: nn.Module) -> str:
    """What a model without PEFT layers holds that a user might take for one, or an empty string."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, dict) else ():
            if isinstance(config, PeftConfig):
                method = str(getattr(config.peft_type, "value", config.peft_type)).lower().replace("_", " ")
                return f"its adapter {name!r} is {method}, which has no layers of its own to accelerate"
        cls = type(module)
        package = cls.__module__.partition(".")[0]
        if package in _LIBRARIES:
            found = f"{cls.__module__}.{cls.__qualname__}"
            return f"it has modules of {_LIBRARIES[package]} ({found}), accelerate takes PEFT's"
        if cls.__module__.startswith("peftkern."):
            return f"it has peftkern's own {cls.__qualname__}, which runs fused as it is"
    return ""

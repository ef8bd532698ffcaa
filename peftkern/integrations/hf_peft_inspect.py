"""What a report says beside the layers: who computes them, and what else a model holds."""

from __future__ import annotations

from peft import PeftConfig
from torch import nn

from ..dispatch import ORDER, Declined, choose, load
from ..problem import Problem, device_arch
from ..settings import current
from .hf_peft_guard import Plan

# Rows of the call that a report asks about: a usual training step. Fewer may be better off elsewhere.
_ROWS = 2048

_LIBRARIES = {"adapters": "the adapters library", "loralib": "loralib", "pyreft": "pyreft", "pyvene": "pyvene"}


def backend_of(plan: Plan) -> str:
    """Name of the back end that computes this layer, forward and backward.

    What ``PEFTKERN_BACKEND`` names and cannot take it is said as such: every call raises it.
    """
    weight, bias, branches = plan
    device, (N, K) = weight.device, weight.shape
    arch = device_arch(device.type, device.index)
    R = sum(b.lora_A.shape[0] for b in branches)
    dropout = {"dropout"} if any(b.dropout_p for b in branches) else set()

    def taker(part: str, flags: set[str]) -> str:
        adapter = branches[0].lora_A.dtype
        problem = Problem(
            f"lora_linear_{part}", device.type, arch, weight.dtype, adapter, _ROWS, N, K, R, frozenset(flags | dropout)
        )
        return choose(problem)[0]

    try:
        forward = taker("fwd", set() if bias is None else {"bias"})
        backward = {taker("bwd_adapter", {"need_A", "need_B"}), taker("bwd_input", set())} - {forward}
    except Declined as error:
        return f"none ({error})"
    return ", backward ".join([forward, *sorted(backward)])


def only_reference(device: str) -> str | None:
    """Why no back end works for tensors of this device type, so that the reference computes all, or None."""
    if current().backend != "auto":
        return None
    reasons = {name: load(name).unavailable() for name in ORDER.get(device, ())}
    if all(reasons.values()):
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return None


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

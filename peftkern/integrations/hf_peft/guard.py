"""Which calls of a PEFT LoRA layer the fused op may take, decided anew at each call.

``layer_plan`` looks at the layer, ``input_reason`` at the input. Both only read attributes and
dictionaries, a few microseconds, and cache nothing, so that a hook, an adapter or a dtype that changes
between two calls is always seen. Nothing here depends on grad mode: reentrant checkpointing runs the
forward once without and once with it, and both runs must take the same path (else they draw different
dropout bits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from packaging.version import InvalidVersion, Version
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _nn_module
from transformers.pytorch_utils import Conv1D

from . import fsdp as _fsdp

# Releases whose lora.Linear.forward is the one that this integration reproduces; the test suite runs on each.
PEFT_RELEASES = ((0, 18), (0, 19), (0, 20), (0, 21))

_PLAIN_TENSORS = (Tensor, nn.Parameter)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LINEAR_FORWARD = nn.Linear.forward
_CONV1D_FORWARD = Conv1D.forward

Read = Callable[[nn.Module, str], Any]


class Branch(NamedTuple):
    """One active adapter of a layer, its parts looked up once per call."""

    name: str
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    dropout_p: float  # 0 outside of training


class Plan(NamedTuple):
    """A layer whose forward is y = x W^T + bias + sum of branches, or, in a mixed batch, the branch of each row."""

    weight: Tensor  # (N, K)
    bias: Tensor | None
    branches: list[Branch]


def version_reason(version: str) -> str | None:
    """Why this release of PEFT is not covered, or None."""
    try:
        release = Version(version).release
    except InvalidVersion:
        release = ()
    if release[:2] in PEFT_RELEASES:
        return None
    low, high = (".".join(map(str, r)) for r in (PEFT_RELEASES[0], PEFT_RELEASES[-1]))
    return f"PEFT {version} is outside the tested range {low} to {high}"


def type_reason(layer: nn.Module) -> str | None:
    """Why a layer of this type is not covered, or None. Exact: a subclass may compute anything."""
    cls = type(layer)
    if cls is ParamWrapper:
        chain = wrapped_parameters(layer)
        names, base = ", ".join(w.parameter_name for w in chain), type(chain[-1].base_layer).__name__
        return f"target_parameters ({names} of {base}) are adapted inside the base layer, which is not covered"
    if cls is not Linear:
        return f"layer type {cls.__module__}.{cls.__qualname__} is not covered"
    if "forward" in layer.__dict__ and not _only_aligns(layer, Linear):
        return "its forward was replaced on the instance"
    return None


def wrapped_parameters(layer: ParamWrapper) -> list[ParamWrapper]:
    """The wrappers of one base layer's parameters, this one first: PEFT nests them, one for each parameter."""
    chain = [layer]
    while type(chain[-1].base_layer) is ParamWrapper:
        chain.append(chain[-1].base_layer)
    return chain


def _only_aligns(module: nn.Module, cls: type) -> bool:
    # accelerate's device_map puts a forward on the instance that moves the input to the weights and then calls the
    # class's. The guard asks for both on one device, so nothing moves, unless the weights are elsewhere between calls.
    own = module.__dict__
    hook, forward = own.get("_hf_hook"), own["forward"]
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and not hook.offload
        and getattr(getattr(forward, "func", None), "__module__", "") == type(hook).__module__ == "accelerate.hooks"
        and getattr(own.get("_old_forward"), "__func__", None) is cls.forward
    )


def _plain_or_none(t: Any) -> bool:
    return t is None or type(t) in _PLAIN_TENSORS


def read(module: nn.Module, name: str) -> Any:
    """A parameter of a part of a layer, or None, as it is now."""
    # nn.Module.__getattr__ costs more than the rest of the guard; it stays for weights that are plain
    # attributes (FSDP's views, replicas of DataParallel).
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _part_reason(part: Any, cls: type, name: str) -> str | None:
    # A part is bypassed only if calling it would run its class's forward and nothing else.
    if type(part) is not cls:
        return f"{name} is a {type(part).__module__}.{type(part).__qualname__}"
    own = part.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return f"{name} carries a hook"
    if "forward" in own and not _only_aligns(part, cls):
        return f"the forward of {name} was replaced on the instance"
    return None


def _base(layer: Linear, read: Read) -> tuple[Tensor, Tensor | None] | str:
    base = layer._modules.get("base_layer")
    conv1d = type(base) is Conv1D
    reason = _part_reason(base, Conv1D if conv1d else nn.Linear, "base_layer")
    if reason is not None:
        return reason
    weight, bias = read(base, "weight"), read(base, "bias")
    if type(weight) not in _PLAIN_TENSORS or not _plain_or_none(bias):
        return f"the base weight is a {type(weight).__name__}, not a plain tensor"
    if weight.requires_grad:
        if _fsdp.trains(base, "weight", weight):
            return "the base weight requires grad"
        weight = weight.detach()
    if bias is not None and bias.requires_grad and not _fsdp.trains(base, "bias", bias):
        bias = bias.detach()
    if weight.dim() != 2:
        return f"the base weight has shape {tuple(weight.shape)}"
    return (weight.t() if conv1d else weight), bias


def _branch(layer: Linear, name: str, N: int, K: int, read: Read) -> Branch | str:
    if name in layer.lora_variant:
        return f"adapter {name!r} is a LoRA variant ({type(layer.lora_variant[name]).__name__})"
    modules = layer._modules
    lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules.get(name)
    dropout = modules["lora_dropout"]._modules.get(name)
    acts = type(dropout) is nn.Dropout
    reason = (
        _part_reason(lora_A, nn.Linear, "lora_A")
        or _part_reason(lora_B, nn.Linear, "lora_B")
        or _part_reason(dropout, nn.Dropout if acts else nn.Identity, "lora_dropout")
    )
    if reason is not None:
        return f"{reason} (adapter {name!r})"
    A, B, bias = read(lora_A, "weight"), read(lora_B, "weight"), read(lora_B, "bias")
    scaling = layer.scaling[name]
    if type(A) not in _PLAIN_TENSORS or type(B) not in _PLAIN_TENSORS or not _plain_or_none(bias):
        return f"a weight of {name!r} is not a plain tensor"
    if read(lora_A, "bias") is not None:
        return f"lora_A of {name!r} has a bias"
    a, b = A.shape, B.shape
    if len(a) != 2 or len(b) != 2 or a[1] != K or b[0] != N or a[0] != b[1]:
        return f"the shapes of {name!r} do not fit: lora_A {tuple(a)}, lora_B {tuple(b)}"
    if A.dtype != B.dtype:
        return f"lora_A and lora_B of {name!r} differ in dtype"
    if type(scaling) is float:
        pass
    elif isinstance(scaling, Tensor):
        if type(scaling) not in _PLAIN_TENSORS or scaling.numel() != 1 or not scaling.is_floating_point():
            return f"the scaling of {name!r} is not one number"
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        return f"the scaling of {name!r} is a {type(scaling).__name__}"
    p = dropout.p if acts and dropout.training else 0.0
    if acts and (dropout.inplace or not 0.0 <= dropout.p < 1.0):
        return f"the dropout of {name!r} is in place or drops everything"
    return Branch(name, A, B, bias, scaling, p)


def _absent(asked: Iterable[str], present: Iterable[str], whose: str) -> str:
    asked, present = (", ".join([f"{n!r}" for n in names]) for names in (asked, present))
    if not asked:
        return "it has no active adapter" if whose == "active" else "it has no adapter of the batch"
    if not present:
        return "it has no adapter"
    return f"it has none of the {whose} adapters ({asked}), it has {present}"


def layer_plan(layer: nn.Module, mixed: Iterable[str] | None = None, read: Read = read) -> Plan | str:
    """The layer's forward as base plus branches, or the reason why it runs PEFT's own code.

    ``mixed``: the adapters of a batch in which each row takes one of them; the active ones do not count then.
    ``read``: how a parameter is looked up.
    """
    reason = type_reason(layer)
    if reason is not None:
        return reason
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged into the base weight"
    base = _base(layer, read)
    if isinstance(base, str):
        return base
    weight, bias = base
    N, K = weight.shape
    present = layer._modules["lora_A"]._modules
    branches = []
    asked = layer.active_adapters if mixed is None else mixed
    for name in asked:
        if name in present:
            branch = _branch(layer, name, N, K, read)
            if isinstance(branch, str):
                return branch
            branches.append(branch)
    if not branches:
        return _absent(asked, present, "active" if mixed is None else "batch's")
    return Plan(weight, bias, branches)


def process_reason() -> str | None:
    """Why no layer of the process may be taken right now, or None."""
    m = _nn_module
    if m._global_forward_hooks or m._global_forward_pre_hooks:
        return "a global module hook is registered"
    if m._global_backward_hooks or m._global_backward_pre_hooks:
        return "a global module hook is registered"
    if nn.Linear.forward is not _LINEAR_FORWARD or Conv1D.forward is not _CONV1D_FORWARD:
        return "the forward of torch.nn.Linear or Conv1D was replaced"
    if torch.compiler.is_compiling():
        # An exported program should run where peftkern is not installed.
        return "torch.export is tracing" if torch.compiler.is_exporting() else None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    if torch._C._functorch.maybe_current_level() is not None:
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


def _dtype_reason(layer: Linear, plan: Plan, x: Tensor) -> str | None:
    device = x.device.type
    weight, bias, branches = plan
    if torch.is_autocast_enabled(device):
        # Autocast makes half precision out of all of these, but leaves fp64 alone.
        tensors = [x, weight, *(b.lora_A for b in branches)]
        if any(t.dtype not in _FLOATS for t in tensors) or not (bias is None or bias.dtype in _FLOATS):
            return "a dtype that autocast does not cast"
        return None
    if weight.dtype != x.dtype or not (bias is None or bias.dtype == x.dtype):
        return f"the input is {x.dtype}, the base layer is not"
    if x.dtype not in _FLOATS and x.dtype != torch.float64:
        return f"the input is {x.dtype}"
    for b in branches:
        dtype = b.lora_A.dtype
        if dtype != x.dtype and not (dtype == torch.float32 and layer.cast_input_dtype_enabled):
            return f"adapter {b.name!r} is {dtype}, the input is {x.dtype}"
        if b.bias is not None and b.bias.dtype != dtype:
            return f"lora_B of {b.name!r} and its bias differ in dtype"
    return None


def input_reason(layer: Linear, plan: Plan, x: Any) -> str | None:
    """Why the fused op cannot take this input (PEFT then takes it, or raises its own error), or None."""
    if type(x) not in _PLAIN_TENSORS or x.layout is not torch.strided or x.is_nested:
        return "the input is not a plain dense tensor"
    device = x.device
    if device.type not in ("cpu", "cuda"):
        return f"device type {device.type} is not covered"
    if x.dim() < 1 or x.shape[-1] != plan.weight.shape[1]:
        return f"the input has shape {tuple(x.shape)}"
    if plan.weight.device != device or not (plan.bias is None or plan.bias.device == device):
        return "the base layer is on another device than the input"
    for b in plan.branches:
        for t in (b.lora_A, b.lora_B, b.bias, b.scaling):
            if isinstance(t, Tensor) and t.device != device:
                return f"adapter {b.name!r} is on another device than the input"
    return _dtype_reason(layer, plan, x)


def call_plan(layer: nn.Module, x: Any, mixed: Iterable[str] | None = None, read: Read = read) -> Plan | str:
    """The plan of this call, or the reason why it runs PEFT's own code. ``mixed`` and ``read`` as in ``layer_plan``."""
    reason = process_reason()
    if reason is not None:
        return reason
    plan = layer_plan(layer, mixed, read)
    if isinstance(plan, str):
        return plan
    reason = input_reason(layer, plan, x)
    return plan if reason is None else reason


def static_plan(layer: nn.Module, read: Read = read) -> Plan | str:
    """``call_plan`` of this layer, as it is now, for an input of its own dtype and device."""
    plan = layer_plan(layer, None, read)
    if isinstance(plan, str):
        return plan
    return input_reason(layer, plan, plan.weight.new_empty((0, plan.weight.shape[1]))) or process_reason() or plan

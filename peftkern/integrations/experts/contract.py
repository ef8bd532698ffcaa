"""transformers' one contract for modules of experts (``use_experts_implementation``), and what such a module computes.

    y_t = sum over the experts e of token t of c[t, e] * norm(Down_e(gate(Up_e(x_t))))

Up and Down are linear layers of each expert, with weights of three dimensions, the first of all experts. Only modules under
the contract are known, whichever of transformers' own implementations the model asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from ...methods.look import NotCovered

# The release whose contract this file repeats, beside the one that is there.
TRANSFORMERS = transformers.__version__, (5, 23)
# Implementations that compute in the dtype of the parameters.
_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
# Modules whose own code ("eager") computes in fp32 whatever the dtype of its parameters.
_WIDE = ("OpenAIPrivacyFilterExperts",)

# (rows sorted by expert, how many each has, the token of each) -> a projection of them
Project = Callable[[Tensor, list[int], Tensor], Tensor]


def release_reason(library: str, version: str, known: tuple[int, int]) -> str | None:
    """Why experts are not covered with this release of a library, or None."""
    if Version(version).release[:2] == known:
        return None
    return f"experts are covered with {library} {known[0]}.{known[1]}, this is {version}"


def under_contract(cls: type) -> bool:
    """Whether the forward of this class is the one that ``use_experts_implementation`` made, with transformers' own table."""
    forward, moe = cls.forward, _moe()
    if moe is None or getattr(forward, "__globals__", None) is not vars(moe):
        return False
    return any(cell.cell_contents is moe.ALL_EXPERTS_FUNCTIONS for cell in forward.__closure__ or ())


def _moe() -> ModuleType | None:
    return sys.modules.get("transformers.integrations.moe")


def asked(experts: nn.Module) -> str:
    """Name of the implementation that the model asks for, ``eager`` for the module's own code."""
    return getattr(experts.config, "_experts_implementation", None) or "eager"


def implementation(experts: nn.Module) -> str:
    """The same, checked. Raises NotCovered with the reason for one that is not known."""
    moe, name = _moe(), asked(experts)
    function = moe.ALL_EXPERTS_FUNCTIONS.get(name)
    if name not in _IMPLEMENTATIONS or (function is not None and function.__module__ != moe.__name__):
        raise NotCovered(f"its experts implementation is {name!r}")
    if name == "eager" and type(experts).__name__ in _WIDE:
        raise NotCovered("its own code computes in fp32, whatever its parameters are")
    if experts._is_expert_parallel:
        raise NotCovered("its experts are spread over devices")
    return name


def projections(experts: nn.Module) -> tuple[str, str]:
    """Names of the weights of Up and Down."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def split(lora_A: Tensor, lora_B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A (E, R, K) and B (E, N, R) of LoRA on a weight of E experts, as PEFT keeps it: A is (E R, K), its first R rows those of
    the first expert; B is (N, R E), expert by expert within a rank."""
    A, B = lora_A.view(experts, -1, lora_A.shape[1]), lora_B.view(lora_B.shape[0], -1, experts)
    return A, B.permute(2, 0, 1).contiguous()


def mixed(experts: nn.Module, call: tuple[Tensor, Tensor, Tensor], up: Project, down: Project) -> Tensor:
    """y (T, K) of a call: tokens x (T, K), the experts (T, k) of each, and the weights (T, k) of those."""
    x, index, weights = call
    if torch.is_autocast_enabled(x.device.type) and asked(experts) == "grouped_mm":
        # It knows no autocast, and takes x in the dtype of its weights.
        with torch.autocast(x.device.type, enabled=False):
            return mixed(experts, (x.to(experts.down_proj.dtype), index, weights), up, down).to(x.dtype)
    (T, k), E = index.shape, len(experts.down_proj)
    ids = index.reshape(-1)
    order = ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=E)[:E].tolist()  # E stands for no expert
    tokens = order // k
    h = up(x[tokens], counts, tokens)
    h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
    y = down(h, counts, tokens)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    y = y * weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(T * k, device=order.device)
    return y[back].unflatten(0, (T, k)).sum(1).to(x.dtype)

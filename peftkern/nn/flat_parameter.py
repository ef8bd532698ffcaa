"""Parameters that FSDP1 holds: in forward a module has views of one flat parameter in their place."""

from __future__ import annotations

from torch import Tensor, nn


def trains(module: nn.Module, name: str, t: Tensor) -> bool:
    """Whether ``t``, which ``module`` has as ``name``, gets a gradient that is kept.

    A flat parameter requires grad as soon as one of its parameters does, and so do all its views. The original one says
    which of them train.
    """
    if not t.requires_grad:
        return False
    flat = t._base
    if not getattr(flat, "_is_flat_param", False) or flat._params is None:
        return True
    infos = [*flat._param_infos, *flat._shared_param_infos]
    for info, original in zip(infos, [*flat._params, *flat._shared_params], strict=True):
        if info.module is module and info.param_name == name:
            return original.requires_grad
    return True

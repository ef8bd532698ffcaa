"""Which layers of a model a checkpoint's adapters belong to: every part has its layer, every target its part."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

import torch
from torch import nn

from .attach_checkpoint import NO_KEY, Checkpoint, refuse
from .attach_layer import features, layer_reason


class Fitted(NamedTuple):
    """A checkpoint and the layer of the model for each of its parts."""

    checkpoint: Checkpoint
    layers: dict[str, nn.Module]


def fit(checkpoint: Checkpoint, modules: dict[str, nn.Module], attached: Container[nn.Module]) -> Fitted:
    """The layers that ``checkpoint`` changes. ``modules``: the model's by name; ``attached``: layers with a bank already.

    Raises ValueError, with file and key, for a checkpoint that does not fit.
    """
    layers: dict[str, nn.Module] = {}
    for name, part in checkpoint.parts.items():
        layer = modules.get(name)
        if layer is None:
            raise refuse(checkpoint.file, part.key_A, f"the model has no module {name!r}")
        reason = None if layer in attached else layer_reason(layer)
        if reason is not None:
            raise refuse(checkpoint.file, part.key_A, f"{name} {reason}")
        if any(layer is other for other in layers.values()):
            raise refuse(checkpoint.file, part.key_A, f"{name} shares its module with another key of the file")
        K, N = features(layer)
        if part.in_features != K:
            shape = (part.rank, part.in_features)
            raise refuse(checkpoint.file, part.key_A, f"has shape {shape}, expected ({part.rank}, {K})")
        if part.out_features != N:
            shape = (part.out_features, part.rank)
            raise refuse(checkpoint.file, part.key_B, f"has shape {shape}, expected ({N}, {part.rank})")
        layers[name] = layer
    for key, name in checkpoint.copies.items():
        module, _, last = name.rpartition(".")
        own = getattr(modules.get(module), last, None)
        if not isinstance(own, torch.Tensor):
            raise refuse(checkpoint.file, key, NO_KEY)
        saved = checkpoint.tensor(key)
        if saved.shape != own.shape or not torch.equal(saved.to(own), own):
            raise refuse(checkpoint.file, key, f"differs from the model's {name}, which is not changed here")
    covered = set(layers.values())
    for name, module in modules.items():
        plain = module in attached or layer_reason(module) is None
        if plain and module not in covered and checkpoint.targets(name):
            key = f"base_model.model.{name}.lora_A.weight"
            raise refuse(checkpoint.file, key, "is missing, though the config's target_modules name it")
    return Fitted(checkpoint, layers)

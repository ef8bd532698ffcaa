"""An embedding with branches: what its methods' ``apply`` takes and gives, and how a base layer is read.

    y = f * (c E[ids] + sum over branches of B A[:, ids])

c is the scale of transformers' scaled embeddings, which branches have too.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...autograd.lora_embedding import lora_embedding
from .. import tuner
from ..look import Look, NotCovered
from ..registry import Plan

_FORWARD = nn.Embedding.forward
_SCALED = re.compile(r"transformers\.models\.\w+\.modeling_\w+\.\w+ScaledWordEmbedding")


class Embedding(NamedTuple):
    """A layer so far. ``pairs``: lora_A (R, V) and lora_B (N, R), scaled, of each branch. ``f`` (N): DoRA's factors."""

    padding: int | None
    weight: Tensor  # (V, N)
    scale: float | Tensor | None = None
    pairs: tuple[Tensor, ...] = ()
    f: Tensor | None = None

    def add(self, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor, scale: float | Tensor | None) -> Embedding:
        """With one more branch, on a table of this scale."""
        lora_B = lora_B * scaling
        if isinstance(scale, Tensor):
            lora_B, scale = lora_B * scale.to(lora_B.dtype), scale.to(self.weight.dtype)
        elif scale is not None:
            lora_B = lora_B * torch.tensor(scale, dtype=self.weight.dtype).item()  # as PEFT rounds it
        return self._replace(pairs=(*self.pairs, lora_A, lora_B), scale=scale)

    def run(self, x: Tensor) -> Tensor:
        """y (..., N) of ids (...)."""
        padding, weight, scale, pairs, f = self
        y = lora_embedding(x, weight, *pairs, scale=scale, padding=padding, wide=f is not None)
        return y if f is None else (y * f).to(weight.dtype)


class Kind(NamedTuple):
    """What a plan knows of an embedding beside its tensors (registry.Kind)."""

    padding: int | None

    by, takes_ids = "torch's embedding", True

    def start(self, weight: Tensor, bias: None) -> Embedding:
        return Embedding(self.padding, weight)

    def refuses(self, plan: Plan, x: Tensor) -> str | None:
        return None if x.dtype in (torch.int64, torch.int32) else f"the input is {x.dtype}"

    def nothing(self, weight: Tensor) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device=weight.device)


def base(look: Look) -> tuple[Tensor, None, Kind]:
    """Table and index of padding of the base layer: torch's embedding, or one of transformers' that is scaled."""
    part = look.part("base_layer")
    cls = None if part is None else type(part.module)
    if cls is not nn.Embedding and not _scaled(cls):
        raise NotCovered("its base_layer is no nn.Embedding")
    part.require(cls, "base_layer")
    if nn.Embedding.forward is not _FORWARD:
        raise NotCovered("the forward of nn.Embedding was replaced")
    part.class_stays()
    for name, usual in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
        if part.value(name) != usual:
            raise NotCovered(f"the embedding has {name}")
    weight, _ = tuner.frozen_tensors(part)
    return weight, None, Kind(part.value("padding_idx"))


def _scaled(cls: type | None) -> bool:
    if cls is None or cls.__bases__ != (nn.Embedding,):
        return False
    return _SCALED.fullmatch(f"{cls.__module__}.{cls.__qualname__}") is not None


def scale(look: Look) -> float | Tensor | None:
    """c of the base layer: a number or a tensor of one element, None for 1."""
    part = look.part("base_layer")
    if not _scaled(type(part.module)):
        if part.value("embed_scale") is not None or part.holds("embed_scale"):  # PEFT would scale its branch alone
            raise NotCovered("the embedding has an embed_scale of its own")
        return None
    c = part.tensor("embed_scale") if part.holds("embed_scale") else part.value("embed_scale")
    if not isinstance(c, float) and not (isinstance(c, Tensor) and c.numel() == 1):
        raise NotCovered("the embedding's scale is not one number")
    return c

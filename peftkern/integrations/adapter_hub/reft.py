"""ReFT of AdapterHub on ``reft``: one call for the first rows of each sequence, one for the last ones.

    y = h, edited at the prefix positions by the first unit, at the suffix positions by the second (or by one, of tied weights)

Which positions is the library's affair: it takes those of the call, so that cached decoding edits each new token as a prefix,
and keeps them in its context for the layers that follow. An overlap is the suffix's. A unit of no positions gets gradients
that are zero, as there. What the library cannot compute, or pairs with the wrong rows, stays with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from adapters.context import ForwardContext
from adapters.methods.reft import ReftModule, ReftUnit
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...autograd.residual.reft import reft
from ...dispatch.least import REFT, least_work
from ...methods.look import Look, NotCovered
from ...nn.orthogonal import parametrised
from ...settings import current
from ..library import Found
from .kind import Kind, check_input
from .projection import activation

_KEPT = "_peftkern_positions"


class Unit(NamedTuple):
    """What a ``ReftUnit`` computes. ``projection``: whose weight is R."""

    module: nn.Module
    projection: nn.Module
    weight: Tensor
    bias: Tensor
    variant: str
    activation: str
    dropout_p: float

    def __call__(self, y: Tensor, positions: Tensor) -> Tensor:
        """y with its rows at these positions (B, P) edited."""
        if not positions.shape[1]:
            return _Beside.apply(y, *self.module.parameters()) if torch.is_grad_enabled() else y
        return reft(
            y, parametrised(self.projection), self.weight, self.bias, positions=positions, variant=self.variant,
            activation=self.activation, dropout_p=self.dropout_p, training=True,
        )  # fmt: skip


class _Beside(torch.autograd.Function):
    """y as it is. What stands beside it gets gradients that are zero."""

    @staticmethod
    def forward(ctx, y, *beside):
        ctx.save_for_backward(*beside)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        zeros = zip(ctx.saved_tensors, ctx.needs_input_grad[1:])
        return dy, *(torch.zeros_like(p) if needed else None for p, needed in zeros)


class Kept(NamedTuple):
    """The positions (B, P) of each unit, and the sizes and the library's indices for which they were made.
    ``one_sided``: there is no prefix, or no suffix."""

    sizes: tuple
    indices: dict[str, Tensor | None]
    positions: tuple[Tensor, ...]
    one_sided: bool


def _unit(look: Look) -> Unit:
    look.require(ReftUnit, "a unit")
    source, projection, drop = (look.part(name) for name in ("learned_source", "projection", "dropout"))
    source.require(nn.Linear, "learned_source")
    if parametrize.type_before_parametrizations(projection.module) is not nn.Linear:
        raise NotCovered("its projection is not an nn.Linear")
    projection.require(type(projection.module), "projection")
    drop.require(nn.Dropout, "dropout")
    p = drop.value("p")
    if drop.value("inplace") or not 0.0 <= p < 1.0:
        raise NotCovered("its dropout is in place or drops everything")
    return Unit(
        look.module,
        projection.module,
        source.tensor("weight"),
        source.tensor("bias"),
        "noreft" if look.value("subtract_projection") else "nodireft",
        activation(look.part("non_linearity"), "non_linearity"),
        p if drop.value("training") else 0.0,
    )


def _plan(look: Look) -> tuple[Unit, ...]:
    units = look.part("units")
    units.require(nn.ModuleList, "units")
    if len(units.module) != (1 if look.value("tied_weights") else 2):
        raise NotCovered(f"it has {len(units.module)} units")
    if not (look.value("prefix_positions") > 0 or look.value("suffix_positions") > 0):
        raise NotCovered("it has no positions")
    return tuple(_unit(units.part(name)) for name in units.module._modules)


def _index(context: ForwardContext, layer: ReftModule, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    # The library's own indices in its context (B, P, H), made where and as it makes them; but not written out along H.
    B, T, H = h.shape
    held = vars(context)
    prefix, suffix = held.get("pref_idx"), held.get("suff_idx")
    both = prefix is not None and suffix is not None
    if (prefix is None and suffix is None) or (
        both and (suffix.max() >= T or suffix.shape[0] != B or suffix.shape[2] != H)
    ):
        if "seqlens" in held:
            start, end = context.offsets, context.offsets + context.seqlens
        else:
            start, end = (torch.full((B,), at, device=h.device) for at in (0, T))

        def rows(origin: Tensor, first: int, last: int) -> Tensor:
            along = torch.arange(first, last, device=h.device)[:, None].expand(B, last - first, 1)
            return (origin.view(-1, 1, 1) + along).expand(-1, -1, H)

        if layer.prefix_positions > 0:
            prefix = context.pref_idx = rows(start, 0, min(layer.prefix_positions, T))
        if layer.suffix_positions > 0:
            suffix = context.suff_idx = rows(end, -min(layer.suffix_positions, T), 0)
    return prefix if layer.prefix_positions > 0 else None, suffix if layer.suffix_positions > 0 else None


def _positions(index: Tensor | None, h: Tensor, name: str) -> Tensor:
    B, T, H = h.shape
    if index is None:
        return torch.empty((B, 0), dtype=torch.int64, device=h.device)
    if index.shape[0] != B or index.shape[2] != H or index.device != h.device:
        raise NotCovered(f"{name} positions in the context are those of another input")
    at = index[:, :, 0]
    if at.is_cpu and at.numel() and not 0 <= at.min() <= at.max() < T:
        raise NotCovered(f"{name} positions are not within the sequence, where the library raises")
    return at.contiguous()


def _kept(layer: ReftModule, h: Tensor) -> Kept:
    context = ForwardContext.get_context()
    if context is None:
        raise NotCovered("it is called outside of a model's forward")
    held = vars(context)
    kept = held.get(_KEPT)
    counts = layer.prefix_positions, layer.suffix_positions
    sizes = *counts, layer.tied_weights, h.shape, h.device
    if kept is not None and kept.sizes == sizes and all(held.get(n) is v for n, v in kept.indices.items()):
        return kept
    with torch.inference_mode(False), torch.no_grad():
        prefix, suffix = (
            _positions(index, h, name) for index, name in zip(_index(context, layer, h), ("prefix", "suffix"))
        )
        P, S = prefix.shape[1], suffix.shape[1]
        if not P + S or P > counts[0] or (S != counts[1] and (P or S > counts[1])):
            raise NotCovered("the library writes rows of the suffix to others than they were made of")
        if P and S:
            prefix = prefix.masked_fill((prefix[:, :, None] == suffix[:, None]).any(-1), -1)
    positions = (torch.cat([prefix, suffix], 1),) if layer.tied_weights else (prefix, suffix)
    kept = Kept(sizes, {name: held.get(name) for name in ("pref_idx", "suff_idx")}, positions, not (P and S))
    setattr(context, _KEPT, kept)
    return kept


def _run(units: tuple[Unit, ...], layer: ReftModule, hidden_states: Tensor) -> Tensor:
    h = hidden_states
    for unit in units:
        for like in (unit.weight, next(unit.projection.parameters())):
            check_input(h, like)
    if h.dim() != 3 or h.shape[2] != units[0].weight.shape[1]:
        raise NotCovered(f"the input has shape {tuple(h.shape)}")
    kept = _kept(layer, h)
    if kept.one_sided and not torch.is_autocast_enabled(h.device.type):
        # The library puts rows of torch's default dtype for what is empty.
        default = torch.get_default_dtype()
        if h.dtype != (torch.promote_types(h.dtype, default) if len(units) == 1 else default):
            raise NotCovered(f"the input is {h.dtype}, the library makes empty rows of {default} and raises")
    # What edits nothing comes first: so what is put out is no view of the input.
    for unit, positions in sorted(zip(units, kept.positions), key=lambda part: part[1].shape[1] > 0):
        h = unit(h, positions)
    return h


def _found(units: tuple[Unit, ...], rows: int) -> Found:
    return Found("torch's own steps on the listed rows", units[0].weight.device.type)


def _least(units: tuple[Unit, ...]) -> int:
    return 0 if any(parametrize.is_parametrized(unit.projection) for unit in units) else least_work(REFT, current())


KINDS = (Kind(ReftModule, _plan, _run, _found, _least),)

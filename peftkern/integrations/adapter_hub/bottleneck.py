"""Bottleneck adapters of AdapterHub: ``Adapter`` in the residual stream, ``ParallelAdapter`` beside a part of the model.

    y = residual + gate * drop(scaling * (f(norm(x) down^T + down_bias) up^T + up_bias)),    norms before and after by torch

Which residual and which norms of the model stand around it is the affair of the library's ``pre_forward`` and ``post_forward``,
which run as they are. A ``ParallelAdapter`` gives its branch alone, and its ``post_forward`` adds the rest: here the layer that
calls both (composition.py) says what that will be, and ``forward`` adds it at once.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from adapters.methods.modeling import Adapter, ParallelAdapter
from torch import Tensor, nn

from ...autograd.residual.bottleneck_adapter import bottleneck_adapter
from ...dispatch.least import BOTTLENECK, least_work
from ...methods.look import Look, NotCovered
from ...problem import Problem, problem_like
from ...settings import current
from .kind import Kind, check_gain, check_input
from .projection import Projection, activation, projection


class Bottleneck(NamedTuple):
    """What a module computes. ``norm_before``, ``norm_after``, ``gate``, ``drops_rows``: modules that are called, or None."""

    down: Projection
    up: Projection
    activation: str
    scaling: float | Tensor
    dropout_p: float
    norm_before: nn.Module | None
    norm_after: nn.Module | None
    gate: nn.Module | None
    drops_rows: nn.Module | None

    @property
    def scales(self) -> tuple[float | Tensor, Tensor | None]:
        """(scaling, out_scale) of ``bottleneck_adapter``: a factor, and a vector (N) or None."""
        channels = isinstance(self.scaling, Tensor) and self.scaling.numel() != 1
        return (1.0, self.scaling) if channels else (self.scaling, None)

    def __call__(self, x: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
        """residual + the branch of x."""
        h = taken(x if self.norm_before is None else self.norm_before(x), residual)
        scaling, out_scale = self.scales
        y = bottleneck_adapter(
            h, self.down.weight(), self.up.weight(), down_bias=self.down.bias, up_bias=self.up.bias,
            activation=self.activation, scaling=scaling, out_scale=out_scale, residual=residual, gate=gate,
            dropout_p=self.dropout_p, training=True,
        )  # fmt: skip
        return y if self.norm_after is None else self.norm_after(y)


class _Around(threading.local):
    """What the layer that calls an adapter does with it: ``fuses`` adapters by attention, runs them in ``parts`` of
    the batch (composition.py), or adds ``beside`` to its branch.
    ``added``: the adapter has done so."""

    def __init__(self) -> None:  # of the instance from the start: compiled code asks whether it has them
        self.fuses = self.parts = self.added = False
        self.beside: Tensor | None = None


around = _Around()


def _scaling(look: Look) -> float | Tensor:
    value = look.value("scaling")
    return look.tensor("scaling") if value is None else value


def _dropout_p(look: Look) -> float:
    look.require(nn.Dropout, "dropout")
    p = look.value("p")
    if not 0.0 <= p < 1.0:
        raise NotCovered("its dropout drops everything")
    return p if look.value("training") else 0.0


def _plan(look: Look) -> Bottleneck:
    down, norm_before, norm_after = look.part("adapter_down"), None, None
    down.require(nn.Sequential, "adapter_down")
    first = int(look.value("add_layer_norm_before"))
    if first:
        norm_before = down.part("0").module
    if len(down.module) != first + 2:
        raise NotCovered(f"adapter_down has {len(down.module)} parts")
    if look.value("add_layer_norm_after"):
        norm_after = look.part("adapter_norm_after").module
        if not look.value("adapter_residual_before_ln"):
            raise NotCovered("the residual is added behind a norm of its own")
    rows, lower = look.part("DropPath"), projection(down.part(str(first)), "down")
    check_gain(lower.like)
    return Bottleneck(
        lower,
        projection(look.part("adapter_up"), "up"),
        activation(down.part(str(first + 1)), "non_linearity"),
        _scaling(look),
        _dropout_p(look.part("dropout")),
        norm_before,
        norm_after,
        look.part("gate").module if look.value("use_gating") else None,
        None if rows is None or not rows.value("training") else rows.module,
    )


def _plan_beside(look: Look) -> Bottleneck:
    if look.value("add_layer_norm_after"):
        raise NotCovered("its branch goes through a norm of its own")
    return _plan(look)._replace(drops_rows=None)  # which this class never calls


def taken(x: Tensor, residual: Tensor) -> Tensor:
    """x as a bottleneck takes it: under autocast in the dtype of what the branch is added to."""
    return x.to(residual.dtype) if torch.is_autocast_enabled(x.device.type) else x


def check(plan: Bottleneck, x: Any, residual: Any) -> None:
    """Refuse inputs that do not fit. Raises NotCovered with the reason."""
    check_input(x, plan.down.like)
    check_input(residual, plan.down.like)
    (N, R), K = plan.up.shape, plan.down.shape[1]
    if x.dim() < 2 or x.shape[-1] != K or residual.shape != (*x.shape[:-1], N) or plan.down.shape[0] != R:
        raise NotCovered(f"the input has shape {tuple(x.shape)}, the residual {tuple(residual.shape)}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        if residual.dtype != dtype or (isinstance(plan.scaling, Tensor) and plan.scaling.dtype != dtype):
            raise NotCovered(f"under autocast the sum would not be {dtype}")


def _gate(plan: Bottleneck, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    # What the branch of each row is scaled by, and the library's own shape of what it calls gate.
    score, gate = None, None
    if plan.gate is not None:
        score = gate = torch.mean(torch.sigmoid(plan.gate(x)), dim=1).unsqueeze(-1)
    if plan.drops_rows is not None:
        rows = plan.drops_rows(x.new_ones((len(x),) + (1,) * (x.dim() - 1)))
        gate = rows if gate is None else rows * gate
    return gate, score


def _run(plan: Bottleneck, layer: nn.Module, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> tuple:
    if around.fuses:
        raise NotCovered("AdapterFusion reads what it adds")
    if output_gating and plan.gate is None:
        raise NotCovered("what it adds is told as its gating score")
    check(plan, x, residual_input)
    if plan.gate is not None and x.dim() != 3:
        raise NotCovered(f"the input of its gate has shape {tuple(x.shape)}")
    gate, score = _gate(plan, x)
    y = plan(x, residual_input, gate)
    # down and up are read by AdapterFusion alone.
    return (y, None, None, score) if plan.gate is not None and output_gating else (y, None, None)


def _run_beside(
    plan: Bottleneck, layer: nn.Module, x: Tensor, residual_input: Tensor, output_gating: bool = False
) -> tuple:
    if around.beside is None:
        raise NotCovered("what it is added to comes later: it is not the only adapter of its layer")
    result = _run(plan, layer, x, around.beside, output_gating)
    around.added = True
    return result


def _call(plan: Bottleneck, rows: int) -> Problem:
    (N, R), K = plan.up.shape, plan.down.shape[1]
    channel = isinstance(plan.scaling, Tensor)
    flags = {
        "down_bias": plan.down.bias, "up_bias": plan.up.bias, "out_scale": channel, "residual": True,
        "gate": plan.gate, plan.activation: True, "dropout_out": plan.dropout_p > 0.0,
    }  # fmt: skip
    return problem_like(plan.down.like, "bottleneck_adapter", plan.down.like.dtype, (rows, N, K, R), flags)


def _least(plan: Bottleneck) -> int:
    return least_work(BOTTLENECK, current())


KINDS = (Kind(Adapter, _plan, _run, _call, _least), Kind(ParallelAdapter, _plan_beside, _run_beside, _call, _least))

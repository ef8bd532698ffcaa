"""What is measured: a Case (one problem), a Step (one provider's training step), and a Provider."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.problem import short

PASSES = ("fwd", "fwd_bwd")
BASE, FP32_BASE = "base", "base_fp32"
# Beside these two, what a block is compared with, where a bench has it: peftkern's own base product, and a large copy.
OWN_BASE, COPY = "base_own", "copy"
REFERENCES = (BASE, FP32_BASE, OWN_BASE, COPY)


@dataclass(frozen=True)
class Case:
    """One problem. M rows, K in_features, N out_features, R rank; ``dropout`` is a probability.

    With many adapters: their number, the ``mix`` that rows take them in and the ``base_share`` that takes none (see
    populations.py), ``ranks`` (``same`` or ``mixed``, R the largest) and ``phase`` (``decode``: forward in inference
    mode, ``training``: both passes). Other ops leave them out, and their rows do not have them.
    """

    op: str
    device: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    M: int
    K: int
    N: int
    R: int
    dropout: float
    adapters: int | None = None
    mix: str | None = None
    base_share: float | None = None
    ranks: str | None = None
    phase: str | None = None

    @property
    def many(self) -> dict[str, Any]:
        """The fields of a problem with many adapters, empty for one with a single adapter."""
        names = ("adapters", "mix", "base_share", "ranks", "phase")
        return {} if self.adapters is None else {name: getattr(self, name) for name in names}

    @property
    def passes(self) -> tuple[str, ...]:
        """What is timed."""
        return PASSES[:1] if self.phase == "decode" else PASSES

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, K, N), the order of the command line."""
        return self.M, self.K, self.N

    @property
    def block(self) -> tuple:
        """Cases with the same block share x, weight and dy, and are timed in one interleaved run."""
        return self.op, self.device, self.dtype, self.shape, self.R, *self.many.values()

    def __str__(self) -> str:
        return (
            f"{self.op} {short(self.dtype)} {self.M}x{self.K}x{self.N} R={self.R} "
            f"adapters={short(self.adapter_dtype)} dropout={self.dropout:g}"
            + (f" {self.adapters} {self.mix} base={self.base_share:g} ranks={self.ranks}" if self.many else "")
        )


@dataclass
class Step:
    """One provider, ready to run. Lists are indexed by the copy of the data (see ``Bench.copies``).

    ``forward(i)`` returns the output, ``leaves[i]`` is what the backward pass makes gradients for, ``dy[i]`` the
    output's gradient, ``frozen`` the parameters that autograd may keep at no cost.
    """

    forward: Callable[[int], Tensor]
    leaves: Sequence[Sequence[Tensor]]
    dy: Sequence[Tensor]
    frozen: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Floor:
    """What no implementation can do without: FLOPs and bytes of the base alone and of the branch on top of it."""

    base_flops: float
    branch_flops: float
    base_bytes: float
    branch_bytes: float


@dataclass(frozen=True)
class Provider:
    """One way to compute an op. ``missing()`` says why it cannot run here; ``probe_as`` names the provider whose speed
    at a small shape stands for this one's; ``warm_steps`` full steps run before the first timed one.

    ``passes``: what it can do at all. ``gated``: ours, timed only if the bench's gate finds it accurate. ``floor``: its
    own, if it computes something else than the whole op. ``unusable(case)`` says why it cannot take a case, which is no
    failure. ``around`` makes the context that its steps run in. ``no_graph``: why it is not captured in a CUDA graph.
    """

    name: str
    title: str
    build: Callable[[Case, Any], Step]
    missing: Callable[[], str | None] = lambda: None
    probe_as: str | None = None
    warm_steps: int = 0
    passes: tuple[str, ...] = PASSES
    gated: bool = False
    floor: Callable[[Case, str], Floor] | None = None
    unusable: Callable[[Case], str | None] = lambda case: None
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    no_graph: str | None = None

    def timed(self, case: Case) -> tuple[str, ...]:
        """The passes of ``case`` that this provider has."""
        return tuple(which for which in case.passes if which in self.passes)

"""Tensors of a block of cases with many adapters: activations, frozen weights, and sets of adapters in every form.

A *copy* is one turn of the rotation: a set of adapters and, in the same rotation, one of a few frozen weights. All
forms of a set (matrices, one padded stack, a bank) hold the same values.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

import peftkern

from ..core.case import Case
from ..core.populations import adapter_ids, adapter_ranks
from ..measure.device_timing import rotation
from . import data

# Scalings of the adapters, in turn: not all alike, so that a provider that mixes them up is found out.
SCALINGS = (2.0, 1.0, 0.5)
MAX_COPIES = 64
# Rows of a stacked matrix are padded to this: grouped_mm wants strides of 16 bytes.
_PAD = 8


def copies(case: Case, cache_bytes: int) -> int:
    """Decoding reads adapters and W from memory, as a model of many layers does: enough sets of adapters in use to
    exceed the last cache twice. In training, or where a layer is small itself, one; on a GPU never one."""
    if case.device == "cuda" and case.phase != "decode":
        return rotation((case.M * (case.K + case.N) + case.K * case.N) * case.dtype.itemsize, cache_bytes)
    if case.phase != "decode" or case.K * case.N * case.dtype.itemsize < 1 << 20:
        return 1
    ranks = adapter_ranks(case.ranks, case.R, case.adapters)
    used = adapter_ids(case.mix, case.adapters, case.M, case.base_share).unique().tolist()
    each = sum(ranks[i] for i in used if i >= 0) * (case.K + case.N) * case.adapter_dtype.itemsize
    return max(1, min(MAX_COPIES, -(-2 * cache_bytes // max(each, 1))))


@dataclass
class Stack:
    """A set as one tensor: A (adapters, R, K) and B (adapters, N, R), zeros beyond an adapter's own rank."""

    A: Tensor
    B: Tensor


@dataclass
class MultiData:
    """``x`` (M, K), ``weight`` (N, K) and ``dy`` (M, N), a few of each; the adapters are made when asked for."""

    case: Case
    copies: int
    x: list[Tensor]
    weight: list[Tensor]
    dy: list[Tensor]
    made: dict = field(default_factory=dict)

    @functools.cached_property
    def ids(self) -> Tensor:
        """int32 (M), on the case's device: one object, so that its route is made once, as in a model's layers."""
        c = self.case
        return adapter_ids(c.mix, c.adapters, c.M, c.base_share).to(c.device)

    @functools.cached_property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each adapter of a set."""
        return adapter_ranks(self.case.ranks, self.case.R, self.case.adapters)

    @functools.cached_property
    def scalings(self) -> tuple[float, ...]:
        """Scaling of each adapter of a set."""
        return tuple(SCALINGS[i % len(SCALINGS)] for i in range(self.case.adapters))

    def stacks(self, dtype: torch.dtype) -> list[Stack]:
        """Every copy's set, stacked, trainable."""
        return self._once("stacks", dtype, lambda: [self._stack(dtype, i) for i in range(self.copies)])

    def lists(self, dtype: torch.dtype) -> list[list[tuple[Tensor, Tensor, float]]]:
        """Every copy's set as ``(lora_A (R, K), lora_B (N, R), scaling)`` each, trainable. The matrices lie in the
        stack where all ranks are its own."""
        return self._once("lists", dtype, lambda: [self._list(s) for s in self.stacks(dtype)])

    def bank(self, dtype: torch.dtype) -> tuple[peftkern.AdapterBank, list[Tensor]]:
        """One bank with the sets of all copies, and for each copy the ids that ask for its own."""
        return self._once("bank", dtype, lambda: self._bank(self.lists(dtype)))

    def over(self, kind: str) -> MultiData:
        """The same over the weights in codes of that kind."""
        return self._once(kind, self.case.dtype, lambda: dataclasses.replace(
            self, weight=[peftkern.quantize(w, kind) for w in self.weight]
        ))  # fmt: skip

    def as_fp32(self) -> MultiData:
        """Activations and weights in fp32 (itself if they already are)."""
        if self.case.dtype == torch.float32:
            return self
        return self._once("fp32", torch.float32, lambda: MultiData(
            self.case, self.copies, [x.detach().float().requires_grad_() for x in self.x],
            *([t.float() for t in part] for part in (self.weight, self.dy)),
        ))  # fmt: skip

    def _once(self, name: str, dtype: torch.dtype, make):
        if (name, dtype) not in self.made:
            self.made[name, dtype] = make()
        return self.made[name, dtype]

    def _stack(self, dtype: torch.dtype, i: int) -> Stack:
        c, R = self.case, -(-max(self.ranks) // _PAD) * _PAD
        generator = torch.Generator(c.device).manual_seed(i)
        make = functools.partial(torch.randn, generator=generator, device=c.device)
        A = make(c.adapters, R, c.K).mul_(c.K**-0.5).to(dtype)
        B = make(c.adapters, c.N, R).mul_(R**-0.5).to(dtype)
        for a, r in enumerate(self.ranks):
            A[a, r:] = 0
            B[a, :, r:] = 0
        return Stack(A.requires_grad_(), B.requires_grad_())

    def _list(self, stack: Stack) -> list[tuple[Tensor, Tensor, float]]:
        def own(t: Tensor) -> Tensor:
            return t.detach().contiguous().requires_grad_()

        return [
            (own(stack.A[a, :r]), own(stack.B[a, :, :r]), s)
            for a, (r, s) in enumerate(zip(self.ranks, self.scalings, strict=True))
        ]

    def _bank(self, lists) -> tuple[peftkern.AdapterBank, list[Tensor]]:
        c = self.case
        bank = peftkern.AdapterBank(
            c.K, c.N, max_adapters=self.copies * c.adapters, max_rank=max(self.ranks), dtype=lists[0][0][0].dtype,
            device=c.device,
        )  # fmt: skip
        asked = []
        for i, adapters in enumerate(lists):
            numbers = [bank.add(f"{i}.{a}", *adapter) for a, adapter in enumerate(adapters)]
            table = torch.tensor([*numbers, -1], dtype=torch.int32, device=c.device)
            asked.append(table[self.ids.long()])
        return bank, asked


def make_data(case: Case, copies: int) -> MultiData:
    """As many weights as a block with one adapter rotates, ``copies`` sets of adapters."""
    most = 8 if case.device == "cuda" else max(1, -(-(64 << 20) // (case.K * case.N * case.dtype.itemsize)))
    few = min(copies, 8, most)
    base = data.make_data(case, few)
    return MultiData(case, copies, base.x, base.weight, base.dy)

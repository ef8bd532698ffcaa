"""Adapters as the ops take them: a list of tensors, a table that says where each adapter lies in it, and scalings."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.cpu import multi_call
from ..checks import accumulate_dtype, check_number, check_tensor

INT32_MASK = 2**31 - 1


@dataclass(slots=True, eq=False)
class AdapterTable:
    """One immutable state of a list or bank. ``weights``, ``table``, ``scaling``, ``mask``: as in the op.

    ``max_rank`` is the widest rank that a row can meet. ``slots``: equal for tables whose slots answer to the same ids,
    so that layers can share the route of a batch. ``fixed``: the memory of ``weights`` never moves, as a bank's, which
    leaves what ``weights`` and ``table`` show as it is for as long as the tensor ``table`` lives: a compiled call, or one
    that waits for its backward, holds that and not this object.
    """

    weights: list[Tensor]
    table: Tensor
    scaling: Tensor
    mask: int
    max_rank: int
    in_features: int
    out_features: int
    slots: Hashable
    fixed: bool = False
    _given: object = None

    def native(self) -> object:
        """The adapters as native calls take them (backends/cpu/multi_call.py)."""
        if self._given is None:
            self._given = self.given(self.weights)
        return self._given

    def given(self, weights: Sequence[Tensor]) -> object:
        """The same for ``weights`` in the place of these; False where there is no native call."""
        return multi_call.adapters(
            weights, self.table, self.scaling, self.max_rank, self.in_features, self.out_features, self.fixed
        ) or False  # fmt: skip


def table_of(adapters: Sequence, x: Tensor, dtype: torch.dtype) -> AdapterTable:
    """The table of a sequence of ``(lora_A, lora_B, scaling)`` for an x of ``dtype``.

    Adapters keep fp32 or ``dtype``; if they differ from each other, or are in another dtype, all are taken in fp32.
    Raises ValueError or TypeError with the adapter's number.
    """
    if isinstance(adapters, (str, bytes, Tensor)) or not isinstance(adapters, Sequence):
        raise TypeError(
            f"adapters must be a sequence of (lora_A, lora_B, scaling) or an AdapterBank, got {type(adapters).__name__}"
        )
    if not adapters:
        raise ValueError("adapters is empty: at least one (lora_A, lora_B, scaling) is needed")
    weights: list[Tensor] = []
    scalings = []
    for i, adapter in enumerate(adapters):
        if not isinstance(adapter, (tuple, list)) or len(adapter) != 3:
            raise TypeError(f"adapters[{i}] must be (lora_A, lora_B, scaling), got {type(adapter).__name__}")
        A, B, scaling = adapter
        for name, value in (("lora_A", A), ("lora_B", B)):
            check_tensor(f"adapters[{i}] {name}", value)
            if value.dim() != 2:
                raise ValueError(f"adapters[{i}] {name} has shape {tuple(value.shape)}, expected two dimensions")
            if value.device != x.device:
                raise ValueError(f"adapters[{i}] {name} is on {value.device}, expected {x.device} like x")
        check_number(f"adapters[{i}] scaling", scaling)
        N = weights[1].shape[0] if weights else B.shape[0]
        if A.shape[1] != x.shape[-1]:
            raise ValueError(
                f"adapters[{i}] lora_A has shape {tuple(A.shape)}, expected (R, K) with K = {x.shape[-1]}:"
                f" x has shape {tuple(x.shape)}"
            )
        if B.shape != (N, A.shape[0]):
            raise ValueError(f"adapters[{i}] lora_B has shape {tuple(B.shape)}, expected (N, R) = {(N, A.shape[0])}")
        weights += (A, B)
        scalings.append(float(scaling))
    dtypes = {w.dtype for w in weights}
    if dtypes not in ({dtype}, {torch.float32}):
        weights = [w.to(accumulate_dtype(dtype)) for w in weights]
    weights = [w.contiguous() for w in weights]
    ranks = tuple(w.shape[0] for w in weights[::2])
    return AdapterTable(
        weights, _rows(ranks, x.shape[-1], N, x.device), _constant(tuple(scalings), accumulate_dtype(dtype), x.device),
        INT32_MASK, max(ranks), x.shape[-1], N, len(ranks),
    )  # fmt: skip


_constants: dict[tuple, Tensor] = {}


def _constant(values: tuple, dtype: torch.dtype, device: torch.device, repeats: int = 1) -> Tensor:
    # Made once per content: a copy to a GPU would make the host wait, and may not be captured in a graph.
    def make() -> Tensor:
        with torch.inference_mode(False):
            return torch.tensor(values * repeats, dtype=dtype, device=device)

    if torch.compiler.is_compiling():
        return make()
    key = (values, dtype, device, repeats)
    if key not in _constants:
        if len(_constants) >= 1024:
            _constants.clear()
        _constants[key] = make()
    return _constants[key]


def probabilities(each: tuple[float, ...], repeats: int, device: torch.device) -> Tensor:
    """Drop probabilities as the op takes them: fp64 (slots,), ``each`` that many times over."""
    return _constant(each, torch.float64, device, repeats)


def _rows(ranks: tuple[int, ...], K: int, N: int, device: torch.device) -> Tensor:
    # Whole matrices, each a tensor of its own: see COLUMNS in ops/multi_lora_linear.py.
    rows = tuple((i, R, 2 * i, 0, K, 2 * i + 1, 0, R, 1, 0) for i, R in enumerate(ranks))
    return _constant(rows, torch.int64, device)

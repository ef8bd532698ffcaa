"""Adapters as the ops take them: lists of tensors, a table that says where each adapter lies in them, and scalings."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import CODES
from ..backends.cpu import multi_call
from ..bases.base import Base, kind_of
from ..checks import accumulate_dtype, check_number, check_tensor
from ..dispatch.watch import nobody_watches
from ..ops.adapter_table import AXES, BESIDE, PHI, table_row
from .adapter import Adapter, vectors_of

INT32_MASK = 2**31 - 1
# (slot, symbol) of vectors.
Owners = tuple[tuple[int, str], ...]


@dataclass(slots=True, eq=False)
class AdapterTable:
    """One immutable state of a list or bank. ``weights``, ``table``, ``scaling``, ``mask``, ``vectors`` and ``acting`` are as
    in the op.

    ``max_rank`` is the widest rank that a row can meet. ``slots``: equal for tables whose slots answer to the same ids,
    so that layers can share the route of a batch. ``fixed``: the memory of ``weights`` never moves, as a bank's, which
    leaves what ``weights`` and ``table`` show as it is for as long as the tensor ``table`` lives: a compiled call, or one
    that waits for its backward, holds that and not this object.

    ``owners``: (slot, symbol) of each vector of a list. ``beside``: the name of something that acts on the base, if any
    does.
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
    vectors: Sequence[Tensor] = ()
    acting: str = ""
    owners: Owners = ()
    beside: str | None = None
    _given: object = None

    def native(self) -> object:
        """The adapters as native calls take them (backends/cpu/multi_call.py)."""
        if self._given is None:
            self._given = self.given(self.weights, self.vectors)
        return self._given

    def given(self, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> object:
        """The same for ``weights`` and ``vectors`` in the place of these; False where there is no native call."""
        return multi_call.adapters(
            weights, self.table, self.scaling, self.max_rank, self.in_features, self.out_features, self.fixed, vectors
        ) or False  # fmt: skip


def table_of(adapters: Sequence, x: Tensor, dtype: torch.dtype, base: Base | None = None) -> AdapterTable:
    """The table of a sequence of ``(lora_A, lora_B, scaling)`` and Adapters for an x of ``dtype``.

    Matrices keep fp32 or ``dtype``; if they differ from each other, or are in another dtype, all are taken in fp32.
    ``base`` tells out_features where no adapter has matrices. Raises ValueError or TypeError with the adapter's number.
    """
    if isinstance(adapters, (str, bytes, Tensor)) or not isinstance(adapters, Sequence):
        raise TypeError(
            "adapters must be a sequence of (lora_A, lora_B, scaling) and Adapters, or an AdapterBank,"
            f" got {type(adapters).__name__}"
        )
    if not adapters:
        raise ValueError("adapters is empty: at least one (lora_A, lora_B, scaling) is needed")
    if nobody_watches() and x.is_cpu:
        known = multi_call.adapter_list(adapters, x.shape[-1], dtype)
        if known is not None:
            return _plain(known, x, accumulate_dtype(dtype))
    K, N, weights, scalings, whole = x.shape[-1], None, [], [], False
    activations = [0] * len(adapters)
    for i, adapter in enumerate(adapters):
        if type(adapter) is Adapter:
            A, B, scaling, whole = adapter.lora_A, adapter.lora_B, adapter.scaling, True
            activations[i] = CODES[adapter.activation]
        elif isinstance(adapter, (tuple, list)) and len(adapter) == 3:
            A, B, scaling = adapter
        else:
            kind = type(adapter).__name__
            raise TypeError(f"adapters[{i}] must be (lora_A, lora_B, scaling) or an Adapter, got {kind}")
        check_number(f"adapters[{i}] scaling", scaling)
        scalings.append(float(scaling))
        weights += (A, B)
        if A is not None or type(adapter) is not Adapter:
            N = _check_pair(i, A, B, x, N)
    if N is None:
        N = _out_features(base, x)
    given = [w for w in weights if w is not None]
    dtypes = {w.dtype for w in given}
    wide = accumulate_dtype(dtype)
    if dtypes not in ({dtype}, {torch.float32}, set()):
        given = _cast(given, wide)
    if len(given) < len(weights):
        made, kept = iter(given), given[0].dtype if given else wide
        nothing = x.new_empty((0, K), dtype=kept), x.new_empty((N, 0), dtype=kept)
        given = [nothing[j % 2] if w is None else next(made) for j, w in enumerate(weights)]
    ranks = tuple(A.shape[0] for A in given[::2])
    apart = [_step(w) if j % 2 == 0 else None for j, w in enumerate(given)]
    given = [w.contiguous() if step is None else _memory(w) for w, step in zip(given, apart)]
    steps = tuple(step or K for step in apart[::2])
    if torch.compiler.is_compiling():
        given = [w.view(w.shape) for w in given]  # it refuses a function that gets one tensor twice, as of VeRA
    vectors = _vectors(adapters, x, {"K": K, "N": N}, ranks) if whole else {}
    acting = {symbol for _, symbol in vectors}
    if any(activations):
        acting.add(PHI)
    scaling = _constant(tuple(scalings), wide, x.device, lambda: scalings)
    return AdapterTable(
        given, _rows(ranks, steps, N, x.device, tuple(vectors), tuple(activations)), scaling, INT32_MASK,
        max(ranks), K, N, len(ranks), False, list(vectors.values()), " ".join(s for s in (*AXES, PHI) if s in acting),
        tuple(vectors), _beside(adapters) if acting.intersection(BESIDE) else None,
    )  # fmt: skip


def _plain(known: tuple, x: Tensor, wide: torch.dtype) -> AdapterTable:
    """The table of pairs that the extension has checked: (matrices, ranks, scalings, out_features)."""
    weights, ranks, scalings, N = known
    K, count = x.shape[-1], len(ranks)
    rows = _rows(ranks, (K,) * count, N, x.device, (), (0,) * count)
    scaling = _constant(scalings, wide, x.device, lambda: scalings)
    return AdapterTable(list(weights), rows, scaling, INT32_MASK, max(ranks), K, N, count, False, [])


def _check_pair(i: int, A, B, x: Tensor, N: int | None) -> int:
    """out_features of a pair of matrices that fits x, and N if that is known."""
    for name, value in (("lora_A", A), ("lora_B", B)):
        check_tensor(f"adapters[{i}] {name}", value)
        if value.dim() != 2:
            raise ValueError(f"adapters[{i}] {name} has shape {tuple(value.shape)}, expected two dimensions")
        if value.device != x.device:
            raise ValueError(f"adapters[{i}] {name} is on {value.device}, expected {x.device} like x")
    if A.shape[1] != x.shape[-1]:
        raise ValueError(
            f"adapters[{i}] lora_A has shape {tuple(A.shape)}, expected (R, K) with K = {x.shape[-1]}:"
            f" x has shape {tuple(x.shape)}"
        )
    N = B.shape[0] if N is None else N
    if B.shape != (N, A.shape[0]):
        raise ValueError(f"adapters[{i}] lora_B has shape {tuple(B.shape)}, expected (N, R) = {(N, A.shape[0])}")
    return N


def _cast(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in this dtype; those that adapters share and that get no gradient, as VeRA's, once."""
    known: dict[tuple, Tensor] = {}

    def cast(w: Tensor) -> Tensor:
        if w.requires_grad or type(w) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
            return w.to(dtype)
        key = w.data_ptr(), w.dtype, w.shape, w.stride()
        if key not in known:
            known[key] = w.to(dtype)
        return known[key]

    return [cast(w) for w in weights]


def _step(A: Tensor) -> int | None:
    """From a row to the next of an A that is columns of a larger matrix and need not be copied, as VeRA's."""
    ours = not (A.requires_grad or A.is_contiguous() or torch.compiler.is_compiling())
    return A.stride(0) if ours and A.stride(1) == 1 and A.stride(0) > A.shape[1] > 0 else None


def _memory(A: Tensor) -> Tensor:
    """All elements from the first to the last of a matrix with gaps between its rows, (elements,)."""
    return A.as_strided(((A.shape[0] - 1) * A.stride(0) + A.shape[1],), (1,))


def _out_features(base: Base | None, x: Tensor) -> int:
    if base is None:
        raise ValueError("adapters have no lora_B, which would tell out_features")
    kind = kind_of(base.kind)
    like = base.tensors[0] if base.kind == "dense" else x
    return kind.check(base.tensors, like, None if kind.sized else x.shape[-1], None)[0]


def _vectors(
    adapters: Sequence, x: Tensor, sizes: dict[str, int], ranks: tuple[int, ...]
) -> dict[tuple[int, str], Tensor]:
    """The vectors of all adapters by (slot, symbol)."""
    found = {}
    for i, adapter in enumerate(adapters):
        if type(adapter) is Adapter:
            for symbol, vector in vectors_of(f"adapters[{i}] ", adapter, x, sizes | {"R": ranks[i]}).items():
                found[i, symbol] = vector.contiguous()
    return found


def _beside(adapters: Sequence) -> str:
    """The first argument of an adapter that acts on the base."""
    return next(f"adapters[{i}] {name}" for i, a in enumerate(adapters) if type(a) is Adapter for name in a.beside())


_constants: dict[tuple, Tensor] = {}


def _constant(key: tuple, dtype: torch.dtype, device: torch.device, values: Callable[[], Sequence]) -> Tensor:
    # Made once per content, which ``key`` tells: a copy to a GPU would make the host wait, and may not be captured in a
    # graph.
    def make() -> Tensor:
        with torch.inference_mode(False):
            return torch.tensor(values(), dtype=dtype, device=device)

    if torch.compiler.is_compiling():
        return make()
    key = (*key, dtype, device)
    made = _constants.get(key)
    if made is None:
        if len(_constants) >= 1024:  # another thread may do this between any two lines here
            _constants.clear()
        made = _constants[key] = make()
    return made


def probabilities(each: tuple[float, ...], repeats: int, device: torch.device) -> Tensor:
    """Drop probabilities as the op takes them: fp64 (slots,), ``each`` that many times over."""
    return _constant((each, repeats), torch.float64, device, lambda: each * repeats)


def _rows(
    ranks: tuple[int, ...], steps: tuple[int, ...], N: int, device: torch.device, owners: Owners,
    activations: tuple[int, ...],
) -> Tensor:  # fmt: skip
    # Matrices and vectors, each a tensor of its own. steps: from a row of A to the next.
    def rows() -> list[list[int]]:
        vectors: list[dict[str, tuple[int, int]]] = [{} for _ in ranks]
        for i, (slot, symbol) in enumerate(owners):
            vectors[slot][symbol] = (i, 0)
        return [
            table_row(i, R, 2 * i, 0, step, 2 * i + 1, 0, R, 1, 0, activation=activations[i], **vectors[i])
            for i, (R, step) in enumerate(zip(ranks, steps))
        ]

    return _constant((ranks, steps, N, owners, activations), torch.int64, device, rows)
